// Attention on a quantized cache: append new tokens, seal full blocks, attend (K1, B1, A1 to A3).
// Knows neither tensors nor the instruction set: it is given arrays, threads, a table of kernels.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/feedback.h"
#include "runtime/threads.h"

namespace nsq {

struct Header;  // attention/buffer.h

// What is stored of keys, or of values: each part of the first head of the first row; null if the
// scheme does not store it. Within a head all is dense, of the shape that the schema says.
struct Parts {
  uint8_t* packed = nullptr;
  void* scale = nullptr;
  void* norm = nullptr;
  void* zero = nullptr;
  void* sinks = nullptr;
  void* tail = nullptr;
};

// Elements of each part: where a head or a token of it begins, how many there are of a head.
struct Places {
  int64_t packed, scale, norm, sinks, tail;  // scale is that of zero too
};

// Keys or values: how they are stored, what is stored, and what is new.
struct Side {
  const char* name = "";  // for messages
  Scheme scheme;
  int64_t head_dim = 0;
  int64_t capacity = 0;  // sealed tokens of a row at most, a multiple of the block size
  Parts past, present;   // each part of the present is the same memory, or apart from all others
  Places strides = {};   // from one head to the next, counted through rows and heads
  // Of a cache in buffers: of the first head, past and present, and bytes from one to the next.
  Header *past_header = nullptr, *header = nullptr;
  int64_t buffer_bytes = 0;
  const void* tokens = nullptr;  // new ones, [batch, tokens, kv_heads * head_dim]
  int64_t stride = 0;            // elements from one token to the next
};

// The elements of a head in each part.
Places extents(const Side& side);

// What a model fixes.
struct AttentionOptions {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  float scale = 0;   // 0: 1 / sqrt(head_dim)
  float softcap = 0;  // 0: none
  bool causal = true;
  int64_t sliding_window = 0;  // 0: none
  bool rotary_interleaved = false;
  bool smooth_softmax = false;
};

// One call. Shapes have been checked, what lengths and positions hold has not. Optional arrays are
// null if they are not given. Arrays of void have elements of `dtype`.
struct AttentionCall {
  const Kernels* kernels = nullptr;
  const Threads* threads = nullptr;
  bool exact = false;  // float32 throughout: codes are decoded
  AttentionOptions options;
  Dtype dtype = Dtype::float32;  // or float16
  int64_t batch = 0;
  int64_t tokens = 0;  // new ones of a row, padding included
  const void* query = nullptr;  // [batch, tokens, heads * head_dim]
  int64_t query_stride = 0;     // elements from one token to the next
  Side key, value;
  FeedbackOfHeads key_feedback;  // with which blocks of keys are sealed (F1)
  const int64_t* past_lengths = nullptr;  // [batch]
  const int64_t* new_lengths = nullptr;   // [batch]
  const void* cos = nullptr;              // [rotary_positions, rotary_half]
  const void* sin = nullptr;
  int64_t rotary_positions = 0;
  int64_t rotary_half = 0;
  const int64_t* position_ids = nullptr;  // [batch, tokens]
  const void* bias = nullptr;             // [bias_batch, bias_heads, tokens, bias_tokens]
  int64_t bias_batch = 0;
  int64_t bias_heads = 0;
  int64_t bias_tokens = 0;
  const void* head_sink = nullptr;     // [heads]
  void* output = nullptr;              // [batch, tokens, heads * value's head_dim]
  int64_t* present_lengths = nullptr;  // [batch], which may be past_lengths
};

// After an error the past is what it was, in place too. Results do not depend on the threads.
Status attend(const AttentionCall& call);

}  // namespace nsq
