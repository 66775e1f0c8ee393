// What is compiled once for each instruction set: one table of functions, chosen at run time.
//
// A block is a run of consecutive tokens of one key/value head that share scales (B1). Scales,
// zeros and norms are float32 here: narrowed values of the stored dtype, widened, which is exact.
#pragma once

#include <cstdint>

#include "kernels/coarse.h"
#include "kernels/scheme.h"

namespace nsq {

// The parts of one block, or of consecutive tokens of one; those that the scheme does not store are
// null. All arrays are dense.
struct Block {
  uint8_t* packed;         // [tokens, row_bytes]
  float* norm;             // [tokens]: the norm, or the gain in its place
  float* scale;            // [head_dim], or [tokens] with axis token
  float* zero;             // as scale
  int32_t* outlier_index;  // [k]
  uint16_t* outliers;      // [tokens, k], float16
};

// Order and factor of one key/value head, F1: a permutation of the channels, and finite numbers,
// on the diagonal above 0 and at most 1.
struct Feedback {
  const int32_t* order = nullptr;  // [head_dim]; null where no error moves
  const float* factor = nullptr;   // [head_dim, head_dim], of which what is not below the diagonal
};

// Why a block cannot be coded, and where in it; `rule` is null if nothing is wrong.
struct Refusal {
  // "I2", "N1", "M4", "S5", "O1" or "D3"; "memory" if there is none to work in.
  const char* rule = nullptr;
  const char* reason = nullptr;  // a sentence that says the remedy
  int64_t token = 0;            // in the block, or the channel

  // A scale of a channel is of no token.
  NSQ_INLINE bool is_channel(const Scheme& scheme) const {
    return !scheme.per_token && rule[0] == 'S' && rule[1] == '5';
  }
};

struct Kernels {
  // x[tokens, head_dim] to all parts, bit for bit as the specification says. Block's arrays of
  // norm, scale and zero get narrowed values. Nothing of it is defined if it is refused.
  Refusal (*encode_block)(const Scheme&, const float* x, int64_t tokens, int64_t head_dim,
                          const Feedback& feedback, const Block& block);
  // Rule D1, bit for bit; x_hat[tokens, head_dim].
  void (*decode_block)(const Scheme&, const Block& block, int64_t tokens, int64_t head_dim,
                       float* x_hat);

  // Exact widening of `count` stored floats, and narrowing of a float32 (half to even).
  void (*widen)(const void* stored, Dtype dtype, int64_t count, float* out);
  void (*narrow)(const float* values, Dtype dtype, int64_t count, void* stored);

  // Whether score_codes and add_codes, null if never, take blocks of this scheme; the others are
  // decoded.
  bool (*reads_codes)(const Scheme&, int64_t head_dim);
  // scores[row * stride + t] = <query[row], y of token t>, for rows of query[rows, head_dim].
  // Products of integers: docs/onnx.md derives their error.
  void (*score_codes)(const Scheme&, const Block& block, int64_t tokens, int64_t head_dim,
                      const float* query, int64_t rows, float* scores, int64_t stride);
  // out[row, j] += sum over t of weights[row * stride + t] * (token t)[j], for out[rows, head_dim].
  // Weights are rounded to 8 bits where roundings[row] has room for it, otherwise to 16.
  void (*add_codes)(const Scheme&, const Block& block, int64_t tokens, int64_t head_dim,
                    const float* weights, int64_t stride, int64_t rows, Roundings* roundings,
                    float* out);

  // The same two for float tokens[tokens, head_dim], in float32.
  void (*score_floats)(const float* tokens, int64_t count, int64_t head_dim, const float* query,
                       int64_t rows, float* scores, int64_t stride);
  void (*add_floats)(const float* tokens, int64_t count, int64_t head_dim, const float* weights,
                     int64_t stride, int64_t rows, float* out);

  // The largest of values[count]; -infinity if there are none.
  float (*largest)(const float* values, int64_t count);
  // values = softcap * tanh(values / softcap).
  void (*cap)(float* values, int64_t count, float softcap);
  // values = exp(values - most); returns their sum. -infinity becomes 0.
  float (*exponentials)(float* values, int64_t count, float most);
};

}  // namespace nsq
