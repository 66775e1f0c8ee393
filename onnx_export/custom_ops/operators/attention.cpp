// nsq.Attention: which tensors its cache has, and whether they fit together.
#include "operators/attention_node.h"

namespace nsq {
namespace {

// Positions of the parts of keys, or of values.
enum Part { kPacked, kScale, kNorm, kZero, kSinks, kTail, kParts };

// These parts as parameters; the scale's dtype is that of number `scale`, the norm's the next.
struct PartParameters {
  char names[kParts][24] = {};
  Parameter list[kParts] = {};

  constexpr PartParameters(const char* prefix, int scale) {
    const Parameter parts[kParts] = {
        {"packed", Element::uint8},
        {"scale", varying(scale)},
        {"norm", varying(scale + 1), kOptional},
        {"zero", varying(scale), kOptional},
        {"sinks", kPlain, kOptional},
        {"tail", kPlain},
    };
    for (int i = 0; i < kParts; ++i) {
      char* name = names[i];
      for (const char* text : {prefix, parts[i].name}) {
        while (*text != 0) *name++ = *text++;
      }
      list[i] = {names[i], parts[i].type, parts[i].optional};
    }
  }
};

constexpr PartParameters kPastKeyParts("past_key_", 1), kPastValueParts("past_value_", 3);
constexpr PartParameters kPresentKeyParts("present_key_", 1);
constexpr PartParameters kPresentValueParts("present_value_", 3);

// Positions of the inputs and of the outputs.
enum Input {
  kPastKey = kNewInputs, kPastValue = kPastKey + kParts, kFeedback = kPastValue + kParts,
  kInputs = kFeedback + 2,
};
enum Output {
  kPresentKey = kNewOutputs, kPresentValue = kPresentKey + kParts,
  kOutputs = kPresentValue + kParts,
};

// The tensors of one call.
struct Tensors {
  Tensor inputs[kInputs];
  Tensor outputs[kOutputs];
};

struct AttentionKernel : AttentionNode {
  static constexpr const char* name = "Attention";
  static constexpr TypeChoices types[] = {kPlainTypes, kStoredTypes, kStoredTypes, kStoredTypes,
                                          kStoredTypes};
  static constexpr auto inputs =
      joined(kNewInputList, kPastKeyParts.list, kPastValueParts.list, kFeedbackList);
  static constexpr auto outputs =
      joined(kNewOutputList, kPresentKeyParts.list, kPresentValueParts.list);

  Status compute(Context& context) const;

 private:
  Status check_side(const Tensors& tensors, int first_input, const AttentionCall& call,
                    Side* side) const;
  Status make_outputs(Context& context, AttentionCall* call, Tensors* tensors) const;
};

Status AttentionKernel::check_side(const Tensors& tensors, int first_input,
                                   const AttentionCall& call, Side* side) const {
  const Tensor* past = tensors.inputs + first_input;
  const Scheme& scheme = side->scheme;
  const int64_t batch = call.batch, heads = options_.kv_heads, head_dim = side->head_dim;
  NSQ_TRY(expect_stored(past[kNorm], scheme.separate_norm));
  NSQ_TRY(expect_stored(past[kZero], !scheme.symmetric));
  NSQ_TRY(expect_stored(past[kSinks], scheme.sink_tokens > 0));
  NSQ_TRY(expect_shape(past[kPacked], {batch, heads, -1, scheme.row_bytes(head_dim)}));
  const int64_t capacity = side->capacity = past[kPacked].dim(2);
  if (capacity % scheme.block_size != 0) {
    return Status::error("%s has room for %lld tokens; expected a multiple of the block size, %lld",
                         past[kPacked].name, shown(capacity), shown(scheme.block_size));
  }
  NSQ_TRY(expect_element(past[kScale], element(scheme.scale_dtype)));
  for (int part : {kScale, kZero}) {
    NSQ_TRY(scheme.per_token
                ? expect_shape(past[part], {batch, heads, capacity, 1})
                : expect_shape(past[part], {batch, heads, capacity / scheme.block_size, head_dim}));
  }
  if (past[kNorm]) NSQ_TRY(expect_element(past[kNorm], element(scheme.norm_dtype)));
  NSQ_TRY(expect_shape(past[kNorm], {batch, heads, capacity}));
  NSQ_TRY(expect_shape(past[kSinks], {batch, heads, scheme.sink_tokens, head_dim}));
  NSQ_TRY(expect_shape(past[kTail], {batch, heads, scheme.block_size, head_dim}));
  side->strides = extents(*side);  // after the checks: what they refuse may be too large for it
  return Status();
}

Parts parts_of(const Tensor* tensors) {
  return {tensors[kPacked].as<uint8_t>(), tensors[kScale].data, tensors[kNorm].data,
          tensors[kZero].data, tensors[kSinks].data, tensors[kTail].data};
}

Status AttentionKernel::make_outputs(Context& context, AttentionCall* call,
                                     Tensors* tensors) const {
  Tensor* outputs = tensors->outputs;
  NSQ_TRY(make_new_outputs(context, call, outputs));
  for (int i = 0; i < 2 * kParts; ++i) {
    const Tensor& past = tensors->inputs[kPastKey + i];
    Tensor& present = outputs[kPresentKey + i];
    // One that is not stored is not wanted: without elements it is as good as none.
    constexpr int64_t none[] = {0};
    NSQ_TRY(context.output(kPresentKey + i, past ? past.dims : none, past ? past.rank : 1,
                           &present));
    if (present.present == past.present) continue;
    return Status::error(past ? "%s is not connected; the cache is not whole without it"
                              : "%s is connected, but the scheme does not store it; leave it out",
                         present.name);
  }
  return Status();
}

Status AttentionKernel::compute(Context& context) const {
  Tensors tensors;
  for (int i = 0; i < kInputs; ++i) NSQ_TRY(context.input(i, &tensors.inputs[i]));

  const Threads threads = context.threads();
  AttentionCall call;
  NSQ_TRY(begin(tensors.inputs, tensors.inputs + kFeedback, &threads, &call));
  NSQ_TRY(check_side(tensors, kPastKey, call, &call.key));
  NSQ_TRY(check_side(tensors, kPastValue, call, &call.value));
  NSQ_TRY(make_outputs(context, &call, &tensors));
  int own[kOutputs] = {-1, kPastLengths};
  for (int i = kPresentKey; i < kOutputs; ++i) own[i] = kPastKey + i - kPresentKey;
  NSQ_TRY(expect_apart(tensors.outputs, kOutputs, tensors.inputs, kInputs, own));
  call.key.past = parts_of(tensors.inputs + kPastKey);
  call.key.present = parts_of(tensors.outputs + kPresentKey);
  call.value.past = parts_of(tensors.inputs + kPastValue);
  call.value.present = parts_of(tensors.outputs + kPresentValue);
  return attend(call);
}

}  // namespace

const Variants attention_operator = define_operator<AttentionKernel>();

}  // namespace nsq
