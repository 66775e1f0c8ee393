// nsq.BufferAttention: nsq.Attention on a cache of one tensor a side.
#include "attention/buffer.h"
#include "operators/attention_node.h"

namespace nsq {
namespace {

enum Input { kPastKey = kNewInputs, kPastValue, kFeedback, kInputs = kFeedback + 2 };
enum Output { kPresentKey = kNewOutputs, kPresentValue, kOutputs };
constexpr Parameter kPast[] = {{"past_key", Element::uint8}, {"past_value", Element::uint8}};
constexpr Parameter kPresent[] = {{"present_key", Element::uint8},
                                  {"present_value", Element::uint8}};

struct BufferAttentionKernel : AttentionNode {
  static constexpr const char* name = "BufferAttention";
  static constexpr TypeChoices types[] = {kPlainTypes};
  static constexpr auto inputs = joined(kNewInputList, kPast, kFeedbackList);
  static constexpr auto outputs = joined(kNewOutputList, kPresent);

  Status compute(Context& context) const;

 private:
  Status check_side(const Tensor& past, const AttentionCall& call, Side* side) const;
};

// The last two axes are one: bytes of a head.
Status BufferAttentionKernel::check_side(const Tensor& past, const AttentionCall& call,
                                         Side* side) const {
  NSQ_TRY(expect_shape(past, {call.batch, options_.kv_heads, -1, -1}));
  const int64_t bytes = side->buffer_bytes = past.dim(2) * past.dim(3);
  if (bytes % kBufferAlignment != 0 ||
      reinterpret_cast<uintptr_t>(past.data) % sizeof(int64_t) != 0) {
    return Status::error("%s has %lld bytes a head, or begins at an odd address; expected a "
                         "multiple of %lld, aligned to %zu", past.name, shown(bytes),
                         shown(kBufferAlignment), sizeof(int64_t));
  }
  side->capacity = bytes == 0 ? -1 : buffer_capacity(*side, call.dtype, bytes);
  if (side->capacity < 0) {
    return Status::error("%s has %lld bytes a head, too few for sinks and tail of head_dim=%lld; "
                         "make it for more tokens", past.name, shown(bytes),
                         shown(side->head_dim));
  }
  side->strides = strides_in(*side, call.dtype);
  return Status();
}

Status BufferAttentionKernel::compute(Context& context) const {
  Tensor inputs[kInputs], outputs[kOutputs];
  for (int i = 0; i < kInputs; ++i) NSQ_TRY(context.input(i, &inputs[i]));
  const Threads threads = context.threads();
  AttentionCall call;
  NSQ_TRY(begin(inputs, inputs + kFeedback, &threads, &call));
  NSQ_TRY(check_side(inputs[kPastKey], call, &call.key));
  NSQ_TRY(check_side(inputs[kPastValue], call, &call.value));
  NSQ_TRY(make_new_outputs(context, &call, outputs));
  int own[kOutputs] = {-1, kPastLengths, kPastKey, kPastValue};
  for (int i = kPresentKey; i < kOutputs; ++i) {
    const Tensor& past = inputs[own[i]];
    NSQ_TRY(context.output(i, past.dims, past.rank, &outputs[i]));
    if (outputs[i]) continue;
    return Status::error("%s is not connected; the cache is not whole without it",
                         outputs[i].name);
  }
  NSQ_TRY(expect_apart(outputs, kOutputs, inputs, kInputs, own));
  Side* const sides[] = {&call.key, &call.value};
  for (int i = 0; i < 2; ++i) {
    Side& side = *sides[i];
    const Tensor &past = inputs[kPastKey + i], &present = outputs[kPresentKey + i];
    if (reinterpret_cast<uintptr_t>(present.data) % sizeof(int64_t) != 0) {
      return Status::error("%s begins at an odd address; align it", present.name);
    }
    side.past_header = past.as<Header>();
    side.header = present.as<Header>();
    side.past = parts_in(side, call.dtype, past.data);
    side.present = parts_in(side, call.dtype, present.data);
  }
  return attend(call);
}

}  // namespace

const Variants buffer_attention_operator = define_operator<BufferAttentionKernel>();

}  // namespace nsq
