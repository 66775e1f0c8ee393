// Order and factor of feedback (F1) as inputs of an operator.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "runtime/tensor.h"

namespace nsq {

// Those of all key/value heads, or of none.
class FeedbackOfHeads {
 public:
  // order[kv_heads, head_dim] and factor[kv_heads, head_dim, head_dim], or of one head for all.
  // Both are left out where there is no feedback. Shapes are looked at, values are not.
  Status read(const Tensor& order, const Tensor& factor, int64_t kv_heads, int64_t head_dim);
  // Permutations and triangles, which `of` may be asked for only after this.
  Status check() const;

  // Of a sequence, if the key/value heads are the last axis of the sequences.
  Feedback of(int64_t sequence) const {
    if (heads_ == 0) return {};
    const int64_t head = sequence % heads_;
    return {order_ + head * head_dim_, factor_ + head * head_dim_ * head_dim_};
  }

 private:
  const char *order_name_ = "", *factor_name_ = "";
  const int32_t* order_ = nullptr;
  const float* factor_ = nullptr;
  int64_t heads_ = 0, head_dim_ = 0;
};

}  // namespace nsq
