// One byte or two: whether 8 bits are enough for what codes are multiplied with, a query times
// scales or attention weights times gains. Otherwise it is rounded to 16. docs/onnx.md derives the
// constants, and says what they reach.
#pragma once

#include <cstdint>

#include "kernels/scheme.h"

namespace nsq {

// What decides how a row of values is rounded.
struct Extent {
  float peak;  // the largest magnitude
  float sum, squares;
};

// For a query: its largest element is not far above their root mean square (5 of them), and its
// scores do not spread far (12.5), so that neither does their error. `reach` is about the largest
// factor of an element in a score; fewer than 16 channels do not average errors out.
NSQ_INLINE bool coarse_query(const Extent& extent, float reach, int64_t channels) {
  constexpr float crest = 5.0f, spread = 12.5f;
  const float count = static_cast<float>(channels), peak2 = extent.peak * extent.peak;
  return peak2 * count <= crest * crest * extent.squares &&
         peak2 * count * reach * reach <= spread * spread && channels >= 16;
}

// For weights: what the outputs of one query have lost so far, as sums of squares of
// weight * gain * scale: to the codes, and to rounding weights. Both in units of the same kind: a
// code is off by up to half a scale, a weight by up to half its unit.
struct Roundings {
  float codes = 0;
  float weights = 0;

  // Whether `count` weights may be rounded to multiples of `unit`, whose own sum of squares is
  // `squares`; `scale` is what to multiply both with. If so, it counts as done.
  NSQ_INLINE bool take(float unit, float squares, int64_t count, float scale) {
    constexpr float most = 5.0f / 252;
    codes += squares * scale;
    const float all = weights + unit * unit * static_cast<float>(count) * scale;
    if (!(all <= most * most * codes)) return false;
    weights = all;
    return true;
  }
  // Earlier weights are to be multiplied with `factor`.
  NSQ_INLINE void rescale(float factor) {
    codes *= factor * factor;
    weights *= factor * factor;
  }
};

}  // namespace nsq
