// Exact decisions for the roundings of N1 and M3 that float64 cannot tell, in integers.
//
// Rare and slow. Everything here has internal linkage, see floats.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/floats.h"

namespace nsq {

// An exact sum of finite float64: digits of 32 bits from 2^-1074 upwards, carries postponed. The
// room for them suffices for 2^30 terms.
struct ExactSum {
  int64_t digits[67] = {};
};

static inline void add(ExactSum& sum, double term, int sign) {
  uint64_t bits;
  memcpy(&bits, &term, sizeof bits);
  const int exponent = int(bits >> 52 & 0x7ff);
  const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
  const uint64_t mantissa = exponent ? fraction | uint64_t(1) << 52 : fraction;
  const int position = exponent ? exponent - 1 : 0;
  const uint64_t low = (mantissa & 0xffffffffu) << position % 32;
  const uint64_t high = (mantissa >> 32) << position % 32;
  const int64_t direction = bits >> 63 ? -sign : sign;
  int64_t* digit = sum.digits + position / 32;
  digit[0] += direction * int64_t(low & 0xffffffffu);
  digit[1] += direction * int64_t((low >> 32) + (high & 0xffffffffu));
  digit[2] += direction * int64_t(high >> 32);
}

static inline int sign_of(const ExactSum& sum) {
  int64_t carry = 0, any = 0;
  for (int64_t digit : sum.digits) {
    const int64_t total = digit + carry, low = total & 0xffffffff;
    carry = (total - low) / (int64_t(1) << 32);
    any |= low;
  }
  return carry < 0 ? -1 : carry > 0 || any ? 1 : 0;
}

// Half way between two neighbours, which has 25 bits; infinity counts as 2^128.
static inline double middle_of(float lower, float upper) {
  const double ends[2] = {lower, upper};
  double sum = 0;
  for (double end : ends) sum += end > 0x1p128 ? 0x1p128 : end < -0x1p128 ? -0x1p128 : end;
  return sum / 2;
}

// The float32 nearest to the root of sum x^2, half to even, given that it is one of two neighbours.
static inline float nearest_root(const float* x, int64_t count, float lower, float upper) {
  const double middle = middle_of(lower, upper);
  ExactSum sum;
  for (int64_t j = 0; j < count; ++j) add(sum, double(x[j]) * x[j], 1);
  add(sum, middle * middle, -1);
  const int sign = sign_of(sum);
  return sign < 0 ? lower : sign > 0 ? upper : float(middle);
}

// The sign of <x, y> / <y, y> - quotient, for a y that is not zero and a quotient of 25 bits.
static inline int compare_quotient(const float* x, const float* y, int64_t count, double quotient) {
  ExactSum sum;
  for (int64_t j = 0; j < count; ++j) {
    add(sum, double(x[j]) * y[j], 1);
    // quotient * y has 49 bits: cut in two, each times y has less than 53.
    const double product = quotient * y[j];
    uint64_t bits;
    memcpy(&bits, &product, sizeof bits);
    bits &= ~((uint64_t(1) << 27) - 1);
    double high;
    memcpy(&high, &bits, sizeof high);
    add(sum, high * y[j], -1);
    add(sum, (product - high) * y[j], -1);
  }
  return sign_of(sum);
}

// Map a float to an integer of the same order, or such an integer's bits back.
static inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// The float32 nearest to <x, y> / <y, y>, half to even, which lies from `lower` to `upper`.
static inline float nearest_quotient(const float* x, const float* y, int64_t count, float lower,
                                     float upper) {
  int64_t least = ordered(int32_t(bits_of(lower))), greatest = ordered(int32_t(bits_of(upper)));
  // Cancellation may leave a wide interval: halve it down to two neighbours.
  while (greatest - least > 1) {
    const int64_t between = least + (greatest - least) / 2;
    const float candidate = float_of(uint32_t(ordered(int32_t(between))));
    (compare_quotient(x, y, count, candidate) < 0 ? greatest : least) = between;
  }
  lower = float_of(uint32_t(ordered(int32_t(least))));
  upper = float_of(uint32_t(ordered(int32_t(greatest))));
  const double middle = middle_of(lower, upper);
  const int sign = compare_quotient(x, y, count, middle);
  return sign < 0 ? lower : sign > 0 ? upper : float(middle);
}

}  // namespace nsq
