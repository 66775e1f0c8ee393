// Float32 to the stored dtypes and back: narrowing half to even (S3, Z1), exact widening.
//
// Everything here has internal linkage: this header is compiled for several instruction sets, and
// the linker must not pick one copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/scheme.h"

namespace nsq {

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr float kInfinity = __builtin_inff();

static inline bool is_finite(float value) { return (bits_of(value) & 0x7f800000) != 0x7f800000; }

// The first of values[count] that is not finite, or -1.
static inline int64_t first_not_finite(const float* values, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= uint32_t(!is_finite(values[i]));
  if (any == 0) return -1;
  int64_t first = 0;
  while (is_finite(values[first])) ++first;
  return first;
}

static inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  // The bias of the exponent goes from 15 to 127, and that of infinity and NaN on to the end.
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400u ? subnormal : normal));
}

static inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // Floats from 1/2 to 1 are multiples of 2^-24, as are the subnormals of float16.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t(bits >> 16 & 0x8000u) | uint16_t(magnitude < 0x47800000u ? finite : beyond);
}

static inline float float_of_bfloat16(uint16_t stored) { return float_of(uint32_t(stored) << 16); }

static inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
  const uint32_t nan = bits | 0x400000u;  // stays a NaN, whatever bits are cut off
  return uint16_t(((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) >> 16);
}

// The value that is stored for a float32, widened again; never -0 (Z1).
static inline float stored_value(float value, Dtype dtype) {
  const float narrowed = dtype == Dtype::float16    ? float_of_half(half_of_float(value))
                         : dtype == Dtype::bfloat16 ? float_of_bfloat16(bfloat16_of_float(value))
                                                    : value;
  return narrowed + 0.0f;
}

}  // namespace nsq
