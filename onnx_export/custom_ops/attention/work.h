// What the steps of one call of attention share.
#pragma once

#include <algorithm>
#include <atomic>

#include "attention/attention.h"
#include "runtime/memory.h"

namespace nsq {

inline const uint8_t* at(const void* array, int64_t element, Dtype dtype) {
  return static_cast<const uint8_t*>(array) + element * size_of(dtype);
}
inline uint8_t* at(void* array, int64_t element, Dtype dtype) {
  return static_cast<uint8_t*>(array) + element * size_of(dtype);
}

// How a length is cut in sinks, sealed blocks and tail (docs/cache.md).
struct Cut {
  int64_t sinks, sealed, tail;
  int64_t tail_start() const { return sinks + sealed; }
};

inline Cut cut(const Scheme& scheme, int64_t length) {
  const int64_t sinks = std::min(scheme.sink_tokens, length);
  const int64_t sealed = (length - sinks) / scheme.block_size * scheme.block_size;
  return {sinks, sealed, length - sinks - sealed};
}

// Where a key/value head's parts begin, and those of a sealed token of it.
Places places(const Side& side, int64_t head, int64_t token);

// One row of the batch.
struct Row {
  int64_t past, added, length;
  int64_t stored;  // tokens that the cache says it has: more than `past` if some are taken back
};

struct Work {
  explicit Work(const AttentionCall& call)
      : call(call),
        kernels(*call.kernels),
        kv_heads(call.options.kv_heads),
        group(call.options.heads / call.options.kv_heads) {}

  const AttentionCall& call;
  const Kernels& kernels;
  const int64_t kv_heads;
  const int64_t group;  // query heads that share a key/value head
  Scratch<Row> rows;
  // New tokens as float32, key/value head by head, queries rotated and times the scale.
  Scratch<float> query;  // [batch, kv_heads, tokens, group, head_dim]
  Scratch<float> key;    // [batch, kv_heads, tokens, head_dim], rotated and rounded to the dtype
  Scratch<float> value;
  mutable std::atomic<bool> bias_spoils{false};  // NaN or infinity was added to a score

  // The new tokens of a head, which counts through rows and heads.
  float* staged(const Side& side, int64_t head) const {
    const Scratch<float>& tokens = &side == &call.key ? key : value;
    return tokens.data() + head * call.tokens * side.head_dim;
  }
  const float* widened(const void* array, int64_t count, float* room) const {
    if (call.dtype == Dtype::float32) return static_cast<const float*>(array);
    kernels.widen(array, call.dtype, count, room);
    return room;
  }
  // The first position that a query at this one sees.
  int64_t first_seen(int64_t position) const {
    const int64_t window = call.options.sliding_window;
    return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
  }
  // Calls task(number) for every number below `tasks`; it is false if it has no memory.
  template <typename Task>
  Status parallel(int64_t tasks, const Task& task) const {
    std::atomic<bool> failed{false};
    NSQ_TRY(call.threads->parallel_for(tasks, [&](int64_t number) {
      if (!task(number)) failed = true;
    }));
    return failed ? Status::error("there is no memory for attention's intermediate results")
                  : Status();
  }
};

// Steps of a call. After one that fails the past is what it was, in place too.
Status stage(Work& work);            // new tokens as float32
Status copy_past(const Work& work);  // to the present, unless that is the same memory
Status take_back(const Work& work);  // what is stored behind the past: a block cut in two is decoded
Status seal(const Work& work);       // full blocks, behind those of the past
Status attend(const Work& work);
void write_tails(const Work& work);  // sinks and tail

}  // namespace nsq
