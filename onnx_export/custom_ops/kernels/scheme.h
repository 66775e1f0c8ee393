// How keys or values are coded: the fields of nsq_ref.Scheme, and what follows from them.
//
// Everything is inlined: a function that is compiled for AVX-512 as well must not be the one copy
// that the linker keeps for all.
#pragma once

#include <cstdint>

namespace nsq {

// Numbered as ONNX numbers them.
enum class Dtype : int32_t { float32 = 1, float16 = 10, bfloat16 = 16 };

#define NSQ_INLINE __attribute__((always_inline)) inline

NSQ_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

enum class Magnitude { norm, gain, lsq };

struct Scheme {
  int bits = 4;
  bool separate_norm = true;
  bool per_token = false;  // axis "token"
  bool symmetric = true;
  bool search = false;  // scale_rule "search"
  bool balanced = false;  // norm_rule "balanced"
  Magnitude magnitude = Magnitude::norm;
  int64_t block_size = 0;  // 0: one block of all tokens
  int64_t sink_tokens = 0;
  int64_t outlier_channels = 0;
  Dtype scale_dtype = Dtype::float16;
  Dtype norm_dtype = Dtype::float16;

  NSQ_INLINE int greatest_code() const {
    return symmetric ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  }
  NSQ_INLINE int least_code() const { return symmetric ? -greatest_code() : 0; }
  // Added to a code before it is packed (P1).
  NSQ_INLINE int code_offset() const { return symmetric ? 1 << (bits - 1) : 0; }
  // Bytes of one packed token (P1): 3 bits are a row of 2 and a row of 1.
  NSQ_INLINE int64_t row_bytes(int64_t head_dim) const {
    if (bits == 3) return (head_dim + 3) / 4 + (head_dim + 7) / 8;
    return (head_dim * bits + 7) / 8;
  }
  NSQ_INLINE bool renormalizes() const { return separate_norm && magnitude == Magnitude::norm; }
};

}  // namespace nsq
