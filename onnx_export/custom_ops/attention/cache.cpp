// The cache: what is carried over of the past, full blocks sealed, sinks and tail written.
#include <cstring>

#include "attention/buffer.h"
#include "attention/read.h"

namespace nsq {

namespace {

// Where a sealed token is in a head, and its block's scales.
Places offsets(const Side& side, int64_t token) {
  const Scheme& scheme = side.scheme;
  return {token * scheme.row_bytes(side.head_dim),
          scheme.per_token ? token : token / scheme.block_size * side.head_dim, token, 0, 0};
}

}  // namespace

Places extents(const Side& side) {
  Places all = offsets(side, side.capacity);
  all.sinks = side.scheme.sink_tokens * side.head_dim;
  all.tail = side.scheme.block_size * side.head_dim;
  return all;
}

Places places(const Side& side, int64_t head, int64_t token) {
  const Places inside = offsets(side, token), &strides = side.strides;
  return {head * strides.packed + inside.packed, head * strides.scale + inside.scale,
          head * strides.norm + inside.norm, head * strides.sinks, head * strides.tail};
}

namespace {

constexpr float kMostFloat16 = 65504;

bool in_place(const Parts& past, const Parts& present) {
  return past.packed == present.packed && past.scale == present.scale &&
         past.norm == present.norm && past.zero == present.zero && past.sinks == present.sinks &&
         past.tail == present.tail;
}

// The bytes of one head in a part that is not the past's memory: those before `kept` are the
// past's, those from `used` on are 0, and what is between is written later.
void carry(const void* from, void* to, int64_t first, int64_t kept, int64_t used, int64_t end) {
  if (from == to) return;
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  if (kept > first) {
    std::memcpy(target + first, source + first, static_cast<size_t>(kept - first));
  }
  if (end > used) std::memset(target + used, 0, static_cast<size_t>(end - used));
}

// `head` counts through rows and heads. What is behind the length is cleared, not copied: in the
// past's memory too it may be of another request. Buffers are copied as they are stored.
void copy_head(const Work& work, const Side& side, int64_t row, int64_t head) {
  const Scheme& scheme = side.scheme;
  const Row& lengths = work.rows[row];
  const bool buffers = side.header != nullptr;
  const Cut past = cut(scheme, buffers ? lengths.stored : lengths.past);
  const Cut now = buffers ? past : cut(scheme, lengths.length);
  const Places first = places(side, head, 0), kept = places(side, head, past.sealed);
  const Places used = places(side, head, now.sealed), all = extents(side);
  const Places end = {first.packed + all.packed, first.scale + all.scale, first.norm + all.norm,
                      first.sinks + all.sinks, first.tail + all.tail};
  const Parts &a = side.past, &b = side.present;
  if (buffers) {
    Header* header = header_of(side.header, side.buffer_bytes, head);
    std::memset(static_cast<void*>(header), 0, static_cast<size_t>(side.buffer_bytes));
    *header = *header_of(side.past_header, side.buffer_bytes, head);
  }
  const auto sealed = [&](const void* from, void* to, int64_t Places::*at, int64_t size) {
    carry(from, to, first.*at * size, kept.*at * size, used.*at * size, end.*at * size);
  };
  sealed(a.packed, b.packed, &Places::packed, 1);
  sealed(a.scale, b.scale, &Places::scale, size_of(scheme.scale_dtype));
  sealed(a.zero, b.zero, &Places::scale, size_of(scheme.scale_dtype));
  sealed(a.norm, b.norm, &Places::norm, size_of(scheme.norm_dtype));
  const auto plain = [&](const void* from, void* to, int64_t Places::*at, int64_t old,
                         int64_t all) {
    const int64_t size = size_of(work.call.dtype), token = side.head_dim * size;
    const int64_t start = first.*at * size;
    carry(from, to, start, start + old * token, start + all * token, end.*at * size);
  };
  plain(a.sinks, b.sinks, &Places::sinks, past.sinks, now.sinks);
  // A tail that is sealed is read where it was.
  plain(a.tail, b.tail, &Places::tail, now.sealed == past.sealed ? past.tail : 0, now.tail);
}

// The tokens of a past that ends within a sealed block are decoded into the tail (C1).
bool unseal(const Work& work, const Side& side, int64_t row, int64_t head) {
  const Row& lengths = work.rows[row];
  const Cut past = cut(side.scheme, lengths.past);
  if (past.tail > 0 && past.sealed != cut(side.scheme, lengths.stored).sealed) {
    const int64_t scales = std::max(side.head_dim, side.scheme.block_size);
    const int64_t channels = past.tail * side.head_dim;
    Scratch<float> memory;
    if (!memory.allocate(2 * scales + side.scheme.block_size + channels).ok()) return false;
    float* decoded = memory.data() + 2 * scales + side.scheme.block_size;
    const Room room = {memory.data(), memory.data() + scales, memory.data() + 2 * scales, nullptr};
    const int64_t first = past.tail_start();
    Tokens stored = {&side, cut(side.scheme, lengths.stored), lengths.stored, head, nullptr};
    load(work, stored, first, first + past.tail, room, decoded);
    if (work.call.dtype == Dtype::float16) {
      for (int64_t i = 0; i < channels; ++i) {
        decoded[i] = std::max(-kMostFloat16, std::min(decoded[i], kMostFloat16));
      }
    }
    work.kernels.narrow(decoded, work.call.dtype, channels,
                        at(side.present.tail, places(side, head, 0).tail, work.call.dtype));
  }
  header_of(side.header, side.buffer_bytes, head)->length = lengths.past;
  return true;
}

bool seal_block(const Work& work, const Side& side, int64_t row, int64_t head, int64_t number,
                Refusal* refusal) {
  const Scheme& scheme = side.scheme;
  const int64_t past = work.rows[row].past, tokens = scheme.block_size, head_dim = side.head_dim;
  const int64_t sealed = cut(scheme, past).sealed + number * tokens;
  if (sealed >= cut(scheme, work.rows[row].length).sealed) return true;
  const int64_t first = scheme.sink_tokens + sealed;  // its position
  const float* fresh = work.staged(side, head);
  const int64_t waiting = std::max<int64_t>(past - first, 0);  // of the block, in the tail
  const int64_t scales = scheme.per_token ? tokens : head_dim;
  Scratch<float> room;
  if (!room.allocate(2 * scales + tokens + (waiting > 0 ? tokens * head_dim : 0)).ok()) {
    return false;
  }
  const float* x = fresh + (first - past) * head_dim;
  const bool is_key = &side == &work.call.key;
  const Feedback feedback = is_key ? work.call.key_feedback.of(head) : Feedback();
  const Places to = places(side, head, sealed);
  Block block = {};
  block.packed = side.present.packed + to.packed;
  block.scale = room.data();
  if (side.present.zero != nullptr) block.zero = block.scale + scales;
  if (side.present.norm != nullptr) block.norm = block.scale + 2 * scales;
  if (waiting > 0) {
    float* joined = block.scale + 2 * scales + tokens;
    const Dtype dtype = work.call.dtype;
    work.kernels.widen(at(side.past.tail, to.tail, dtype), dtype, waiting * head_dim, joined);
    std::copy(fresh, fresh + (tokens - waiting) * head_dim, joined + waiting * head_dim);
    x = joined;
  }
  *refusal = work.kernels.encode_block(scheme, x, tokens, head_dim, feedback, block);
  if (refusal->rule != nullptr) {
    if (std::strcmp(refusal->rule, "memory") == 0) return false;
    if (!refusal->is_channel(scheme)) refusal->token += first;
    return true;
  }
  const auto narrow = [&](const float* from, void* part, int64_t place, int64_t count,
                          Dtype dtype) {
    if (part != nullptr) work.kernels.narrow(from, dtype, count, at(part, place, dtype));
  };
  narrow(block.scale, side.present.scale, to.scale, scales, scheme.scale_dtype);
  narrow(block.zero, side.present.zero, to.scale, scales, scheme.scale_dtype);
  narrow(block.norm, side.present.norm, to.norm, tokens, scheme.norm_dtype);
  return true;
}

void write_tail(const Work& work, const Side& side, int64_t row, int64_t head) {
  const Row& lengths = work.rows[row];
  const Cut now = cut(side.scheme, lengths.length);
  const Places to = places(side, head, 0);
  const float* fresh = work.staged(side, head);
  const auto write = [&](int64_t first, int64_t last, void* part, int64_t place, int64_t start) {
    if (first >= last) return;
    work.kernels.narrow(fresh + (first - lengths.past) * side.head_dim, work.call.dtype,
                    (last - first) * side.head_dim,
                    at(part, place + (first - start) * side.head_dim, work.call.dtype));
  };
  write(lengths.past, now.sinks, side.present.sinks, to.sinks, 0);
  write(std::max(lengths.past, now.tail_start()), lengths.length, side.present.tail, to.tail,
        now.tail_start());
}

}  // namespace

Status copy_past(const Work& work) {
  const AttentionCall& call = work.call;
  if (in_place(call.key.past, call.key.present) &&
      in_place(call.value.past, call.value.present)) {
    return Status();
  }
  return work.parallel(call.batch * work.kv_heads, [&](int64_t task) {
    copy_head(work, call.key, task / work.kv_heads, task);
    copy_head(work, call.value, task / work.kv_heads, task);
    return true;
  });
}

Status take_back(const Work& work) {
  const AttentionCall& call = work.call;
  if (call.key.header == nullptr) return Status();
  bool any = false;
  for (int64_t b = 0; b < call.batch; ++b) any |= work.rows[b].past < work.rows[b].stored;
  if (!any) return Status();
  return work.parallel(call.batch * work.kv_heads, [&](int64_t head) {
    const int64_t row = head / work.kv_heads;
    if (work.rows[row].past == work.rows[row].stored) return true;
    return unseal(work, call.key, row, head) && unseal(work, call.value, row, head);
  });
}

Status seal(const Work& work) {
  const AttentionCall& call = work.call;
  // One task a block of a head of a row, those of the longest append in all.
  int64_t blocks[2] = {0, 0};
  const Side* sides[2] = {&call.key, &call.value};
  for (int s = 0; s < 2; ++s) {
    const Scheme& scheme = sides[s]->scheme;
    for (int64_t b = 0; b < call.batch; ++b) {
      const Row& row = work.rows[b];
      const int64_t more = cut(scheme, row.length).sealed - cut(scheme, row.past).sealed;
      blocks[s] = std::max(blocks[s], more / scheme.block_size);
    }
  }
  const int64_t heads = call.batch * work.kv_heads, key_tasks = blocks[0] * heads;
  const int64_t tasks = key_tasks + blocks[1] * heads;
  if (tasks == 0) return Status();
  Scratch<Refusal> refusals;
  NSQ_TRY(refusals.allocate(tasks));
  const auto side_of = [&](int64_t task) { return task < key_tasks ? 0 : 1; };
  const auto head_of = [&](int64_t task) {
    return (task < key_tasks ? task : task - key_tasks) / blocks[side_of(task)];
  };
  NSQ_TRY(work.parallel(tasks, [&](int64_t task) {
    const int s = side_of(task);
    const int64_t head = head_of(task), number = (task - s * key_tasks) % blocks[s];
    refusals[task] = Refusal();
    return seal_block(work, *sides[s], head / work.kv_heads, head, number, &refusals[task]);
  }));
  for (int64_t task = 0; task < tasks; ++task) {
    const Refusal& refusal = refusals[task];
    if (refusal.rule == nullptr) continue;
    return Status::error("%s cannot be sealed at row %lld, head %lld, %s %lld: %s (rule %s)",
                         sides[side_of(task)]->name, shown(head_of(task) / work.kv_heads),
                         shown(head_of(task) % work.kv_heads),
                         refusal.is_channel(sides[side_of(task)]->scheme) ? "channel" : "position",
                         shown(refusal.token), refusal.reason, refusal.rule);
  }
  return Status();
}

void write_tails(const Work& work) {
  const AttentionCall& call = work.call;
  for (int64_t head = 0; head < call.batch * work.kv_heads; ++head) {
    write_tail(work, call.key, head / work.kv_heads, head);
    write_tail(work, call.value, head / work.kv_heads, head);
    for (const Side* side : {&call.key, &call.value}) {
      if (side->header == nullptr) continue;
      *header_of(side->header, side->buffer_bytes, head) = {
          Header::kMark, work.rows[head / work.kv_heads].length};
    }
  }
  for (int64_t b = 0; b < call.batch; ++b) call.present_lengths[b] = work.rows[b].length;
}

}  // namespace nsq
