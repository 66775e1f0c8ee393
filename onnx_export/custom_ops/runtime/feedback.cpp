#include "runtime/feedback.h"

#include <cstring>

#include "kernels/floats.h"
#include "runtime/memory.h"

namespace nsq {
namespace {

// A permutation of the channels, for each head.
Status expect_permutations(const char* name, const int32_t* order, int64_t heads,
                           int64_t head_dim) {
  Scratch<uint8_t> seen;
  NSQ_TRY(seen.allocate(head_dim));
  for (int64_t head = 0; head < heads; ++head) {
    memset(seen.data(), 0, static_cast<size_t>(head_dim));
    for (int64_t p = 0; p < head_dim; ++p) {
      const int32_t channel = order[head * head_dim + p];
      if (channel >= 0 && channel < head_dim && !seen[channel]) {
        seen[channel] = 1;
        continue;
      }
      return Status::error("%s[%lld, %lld] is channel %d, which is %s; each head has a "
                           "permutation of the channels 0 to %lld (rule F1)", name,
                           shown(head), shown(p), channel,
                           channel < 0 || channel >= head_dim ? "none" : "there twice",
                           shown(head_dim - 1));
    }
  }
  return Status();
}

// Above 0 and at most 1, whether or not this thread takes subnormals for 0.
bool is_weight(float value) { return bits_of(value) - 1 < bits_of(1.0f); }

// Whether row p of a factor is 0 before the diagonal, a weight on it and finite behind it.
bool is_row(const float* row, int64_t p, int64_t head_dim) {
  uint32_t wrong = static_cast<uint32_t>(!is_weight(row[p]));
  for (int64_t r = 0; r < p; ++r) wrong |= bits_of(row[r]) << 1;  // of either sign
  for (int64_t r = p + 1; r < head_dim; ++r) wrong |= static_cast<uint32_t>(!is_finite(row[r]));
  return wrong == 0;
}

Status expect_triangles(const char* name, const float* factor, int64_t heads, int64_t head_dim) {
  const float* row = factor;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t p = 0; p < head_dim; ++p, row += head_dim) {
      if (is_row(row, p, head_dim)) continue;
      int64_t r = 0;
      while (r < p ? row[r] == 0 : r == p ? is_weight(row[r]) : is_finite(row[r])) ++r;
      return Status::error("%s[%lld, %lld, %lld] is %.9g; a factor is finite, above 0 and at most "
                           "1 on the diagonal, and 0 below it (rule F1)", name, shown(head),
                           shown(p), shown(r), static_cast<double>(row[r]));
    }
  }
  return Status();
}

}  // namespace

Status FeedbackOfHeads::read(const Tensor& order, const Tensor& factor, int64_t kv_heads,
                             int64_t head_dim) {
  *this = FeedbackOfHeads();
  if (!order && !factor) return Status();
  for (const Tensor* one : {&order, &factor}) {
    const Tensor& other = one == &order ? factor : order;
    if (!*one) {
      return Status::error("%s is given without %s; give both, or neither (rule F1)", other.name,
                           one->name);
    }
  }
  NSQ_TRY(expect_rank(order, 2));
  const int64_t heads = order.dims[0] == 1 ? 1 : kv_heads;
  NSQ_TRY(expect_shape(order, {heads, head_dim}));
  NSQ_TRY(expect_shape(factor, {heads, head_dim, head_dim}));
  order_name_ = order.name;
  factor_name_ = factor.name;
  order_ = order.as<int32_t>();
  factor_ = factor.as<float>();
  heads_ = heads;
  head_dim_ = head_dim;
  return Status();
}

Status FeedbackOfHeads::check() const {
  NSQ_TRY(expect_permutations(order_name_, order_, heads_, head_dim_));
  return expect_triangles(factor_name_, factor_, heads_, head_dim_);
}

}  // namespace nsq
