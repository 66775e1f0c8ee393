// A cache in buffers: all parts of a key/value head in one run of bytes, at places that follow from
// its scheme and their number. onnx_export/operators/cache_buffers.py has the same.
#pragma once

#include "attention/attention.h"

namespace nsq {

// The first bytes of a buffer, zero if it is empty. As the buffer knows how many tokens it has, a
// smaller past is known to be one that is taken back.
struct Header {
  static constexpr int64_t kMark = 0x31304655'4251534e;  // "NSQBUF01"
  int64_t mark;
  int64_t length;
};

constexpr int64_t kBufferAlignment = 64;  // of parts and buffers

// Bytes at which the parts begin, all of a capacity.
struct BufferLayout {
  int64_t sinks, tail, packed, scale, zero, norm, bytes;
};

BufferLayout buffer_layout(const Side& side, Dtype dtype);
// The most sealed tokens that a buffer has room for; -1 if it is too small for none.
int64_t buffer_capacity(const Side& side, Dtype dtype, int64_t bytes);

inline Header* header_of(Header* first, int64_t bytes, int64_t head) {
  return reinterpret_cast<Header*>(reinterpret_cast<uint8_t*>(first) + head * bytes);
}

// Points `past` or `present` of a side to the parts of its first buffer.
Parts parts_in(const Side& side, Dtype dtype, void* buffer);
// Elements from one head's parts to the next's.
Places strides_in(const Side& side, Dtype dtype);

}  // namespace nsq
