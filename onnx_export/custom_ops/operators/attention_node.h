// What the two operators of attention share: their attributes, and the inputs before the cache.
#pragma once

#include "attention/attention.h"
#include "operators/operators.h"
#include "runtime/context.h"

namespace nsq {

// The element type of the model's floats.
constexpr Type kPlain = varying(0);
constexpr TypeChoices kPlainTypes = {Element::float32, Element::float16};

// Positions of the inputs and of the outputs; those of the cache follow.
enum NewInput {
  kQuery, kKey, kValue, kPastLengths, kNewLengths, kCos, kSin, kPositionIds, kBias, kHeadSink,
  kNewInputs,
};
constexpr Parameter kNewInputList[kNewInputs] = {
    {"query", kPlain},
    {"key", kPlain, kOptional},
    {"value", kPlain, kOptional},
    {"past_lengths", Element::int64},
    {"new_lengths", Element::int64, kOptional},
    {"cos", kPlain, kOptional},
    {"sin", kPlain, kOptional},
    {"position_ids", Element::int64, kOptional},
    {"attention_bias", kPlain, kOptional},
    {"head_sink", kPlain, kOptional},
};
enum NewOutput { kOutput, kPresentLengths, kNewOutputs };
constexpr Parameter kNewOutputList[kNewOutputs] = {
    {"output", kPlain},
    {"present_lengths", Element::int64},
};

// The last inputs.
constexpr Parameter kFeedbackList[] = {{"key_order", Element::int32, kOptional},
                                       {"key_factor", Element::float32, kOptional}};

class AttentionNode {
 public:
  Status create(const Attributes& attributes);

 protected:
  // Fills in all of a call but its cache and where it writes.
  Status begin(const Tensor* inputs, const Tensor* feedback, const Threads* threads,
               AttentionCall* call) const;
  // The outputs before the cache.
  Status make_new_outputs(Context& context, AttentionCall* call, Tensor* outputs) const;

  AttentionOptions options_;

 private:
  static Status create_scheme(const Attributes& attributes, Scheme* scheme);
  Status check_new_tokens(const Tensor* inputs, AttentionCall* call) const;
  Status check_options(const Tensor* inputs, AttentionCall* call) const;

  const Kernels* kernels_ = nullptr;
  bool exact_ = false;
  Scheme key_, value_;
};

}  // namespace nsq
