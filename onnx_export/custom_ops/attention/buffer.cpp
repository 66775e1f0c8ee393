// Where the parts of a head are in its buffer.
#include "attention/buffer.h"

namespace nsq {

BufferLayout buffer_layout(const Side& side, Dtype dtype) {
  const Scheme& scheme = side.scheme;
  const Places all = extents(side);
  int64_t next = kBufferAlignment;  // the header
  const auto place = [&](int64_t elements, int64_t size) {
    const int64_t first = next;
    next += (elements * size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    return first;
  };
  const int64_t scale_bytes = size_of(scheme.scale_dtype), norm_bytes = size_of(scheme.norm_dtype);
  BufferLayout layout = {};
  layout.sinks = place(all.sinks, size_of(dtype));
  layout.tail = place(all.tail, size_of(dtype));
  layout.packed = place(all.packed, 1);
  layout.scale = place(all.scale, scale_bytes);
  layout.zero = place(scheme.symmetric ? 0 : all.scale, scale_bytes);
  layout.norm = place(scheme.separate_norm ? all.norm : 0, norm_bytes);
  layout.bytes = next;
  return layout;
}

int64_t buffer_capacity(const Side& side, Dtype dtype, int64_t bytes) {
  const Scheme& scheme = side.scheme;
  // Before anything is multiplied that could be too large for it.
  const int64_t most = bytes / side.head_dim;
  if (scheme.block_size > most || scheme.sink_tokens > most) return -1;
  Side tried = side;
  const auto needed = [&](int64_t blocks) {
    tried.capacity = blocks * scheme.block_size;
    return buffer_layout(tried, dtype).bytes;
  };
  if (needed(0) > bytes) return -1;
  int64_t fits = 0;
  int64_t too_many = bytes / (scheme.block_size * scheme.row_bytes(side.head_dim)) + 1;
  while (too_many - fits > 1) {
    const int64_t blocks = fits + (too_many - fits) / 2;
    (needed(blocks) <= bytes ? fits : too_many) = blocks;
  }
  return fits * scheme.block_size;
}

Parts parts_in(const Side& side, Dtype dtype, void* buffer) {
  const Scheme& scheme = side.scheme;
  const BufferLayout layout = buffer_layout(side, dtype);
  auto* first = static_cast<uint8_t*>(buffer);
  Parts parts;
  parts.packed = first + layout.packed;
  parts.scale = first + layout.scale;
  parts.norm = scheme.separate_norm ? first + layout.norm : nullptr;
  parts.zero = scheme.symmetric ? nullptr : first + layout.zero;
  parts.sinks = scheme.sink_tokens > 0 ? first + layout.sinks : nullptr;
  parts.tail = first + layout.tail;
  return parts;
}

Places strides_in(const Side& side, Dtype dtype) {
  const int64_t bytes = side.buffer_bytes, plain = bytes / size_of(dtype);
  return {bytes, bytes / size_of(side.scheme.scale_dtype), bytes / size_of(side.scheme.norm_dtype),
          plain, plain};
}

}  // namespace nsq
