// The attributes of attention, and whether what comes before the cache fits together.
#include "operators/attention_node.h"

#include <cmath>
#include <limits>

#include "kernels/choose.h"

namespace nsq {
namespace {

constexpr int64_t kMostHeads = int64_t{1} << 31;

Status expect_finite(const char* name, float value) {
  if (std::isfinite(value)) return Status();
  return Status::error("attribute %s is not finite; leave it out, or 0, for the default", name);
}

}  // namespace

Status AttentionNode::create(const Attributes& attributes) {
  NSQ_TRY(choose_kernels(&kernels_));
  exact_ = exact_attention();
  NSQ_TRY(attributes.get("heads", &options_.heads, 1));
  NSQ_TRY(attributes.get("kv_heads", &options_.kv_heads, 1));
  if (options_.heads > kMostHeads || options_.heads % options_.kv_heads != 0) {
    return Status::error("attribute heads=%lld is not a multiple of kv_heads=%lld up to %lld",
                         shown(options_.heads), shown(options_.kv_heads), shown(kMostHeads));
  }
  NSQ_TRY(attributes.get("scale", &options_.scale));
  NSQ_TRY(expect_finite("scale", options_.scale));
  NSQ_TRY(attributes.get("causal", &options_.causal));
  NSQ_TRY(attributes.get("softcap", &options_.softcap));
  NSQ_TRY(expect_finite("softcap", options_.softcap));
  if (options_.softcap < 0) {
    return Status::error("attribute softcap=%g is negative; leave it out, or 0, for none",
                         static_cast<double>(options_.softcap));
  }
  NSQ_TRY(attributes.get("sliding_window", &options_.sliding_window, 0));
  if (options_.sliding_window > 0 && !options_.causal) {
    return Status::error("attribute sliding_window=%lld counts positions back from the query's "
                         "own, which causal=0 does not; use one of the two",
                         shown(options_.sliding_window));
  }
  NSQ_TRY(attributes.get("rotary_interleaved", &options_.rotary_interleaved));
  NSQ_TRY(attributes.get("smooth_softmax", &options_.smooth_softmax));
  NSQ_TRY(create_scheme(attributes.after("key_"), &key_));
  return create_scheme(attributes.after("value_"), &value_);
}

Status AttentionNode::create_scheme(const Attributes& attributes, Scheme* scheme) {
  NSQ_TRY(read_scheme(attributes, scheme));
  if (scheme->block_size < 1) {
    return Status::error("attribute %s must be at least 1: a block of the whole sequence would "
                         "never be full", attributes.full("block_size").text);
  }
  if (scheme->outlier_channels > 0) {
    return Status::error("attribute %s is not supported: the cache has no place for outliers; "
                         "leave it out", attributes.full("outlier_channels").text);
  }
  return Status();
}

// Query, key and value, or all in one.
Status AttentionNode::check_new_tokens(const Tensor* inputs, AttentionCall* call) const {
  const Tensor &query = inputs[kQuery], &key = inputs[kKey];
  const Tensor& value = inputs[kValue];
  const bool together = !key && !value;
  NSQ_TRY(expect_rank(query, 3));
  call->batch = query.dim(0);
  call->tokens = query.dim(1);
  const int64_t kv_heads = options_.kv_heads;
  const int64_t parts = options_.heads + (together ? 2 * kv_heads : 0);
  if (call->batch == 0 || call->tokens == 0 || query.dim(2) == 0 || query.dim(2) % parts != 0) {
    return Status::error(
        "query has shape [%lld, %lld, %lld]; expected [batch, tokens, %lld * head_dim]%s, none of "
        "them 0", shown(call->batch), shown(call->tokens), shown(query.dim(2)), shown(parts),
        together ? " as there is no key" : "");
  }
  const int64_t head_dim = query.dim(2) / parts;
  call->query = query.data;
  call->query_stride = query.dim(2);
  call->dtype = dtype(query.element);
  call->key.head_dim = call->value.head_dim = head_dim;
  call->key.stride = call->value.stride = query.dim(2);
  const int64_t head_bytes = head_dim * size_of(query.element);
  call->key.tokens = query.as<uint8_t>() + options_.heads * head_bytes;
  call->value.tokens = query.as<uint8_t>() + (options_.heads + kv_heads) * head_bytes;
  if (together) return Status();
  NSQ_TRY(expect_present(key));
  NSQ_TRY(expect_present(value));
  NSQ_TRY(expect_shape(key, {call->batch, call->tokens, kv_heads * head_dim}));
  NSQ_TRY(expect_shape(value, {call->batch, call->tokens, -1}));
  if (value.dim(2) == 0 || value.dim(2) % kv_heads != 0) {
    return Status::error("value has %lld channels; expected %lld * head_dim, at least 1 each",
                         shown(value.dim(2)), shown(kv_heads));
  }
  call->value.head_dim = value.dim(2) / kv_heads;
  call->key.tokens = key.data;
  call->key.stride = key.dim(2);
  call->value.tokens = value.data;
  call->value.stride = value.dim(2);
  return Status();
}

// Lengths, rotary embedding, bias and sink of the softmax.
Status AttentionNode::check_options(const Tensor* inputs, AttentionCall* call) const {
  const int64_t batch = call->batch, tokens = call->tokens;
  const Tensor &past = inputs[kPastLengths], &added = inputs[kNewLengths];
  NSQ_TRY(expect_shape(past, {batch}));
  call->past_lengths = past.as<int64_t>();
  NSQ_TRY(expect_shape(added, {batch}));
  call->new_lengths = added.as<int64_t>();

  const Tensor &cos = inputs[kCos], &sin = inputs[kSin];
  const Tensor& positions = inputs[kPositionIds];
  if (cos || sin) {
    NSQ_TRY(expect_present(cos));
    NSQ_TRY(expect_present(sin));
    NSQ_TRY(expect_rank(cos, 2));
    if (cos.dim(1) < 1 || cos.dim(1) > call->key.head_dim / 2) {
      return Status::error("cos has %lld columns; expected 1 to half of head_dim, %lld",
                           shown(cos.dim(1)), shown(call->key.head_dim / 2));
    }
    NSQ_TRY(expect_shape(sin, {cos.dim(0), cos.dim(1)}));
    call->cos = cos.data;
    call->sin = sin.data;
    call->rotary_positions = cos.dim(0);
    call->rotary_half = cos.dim(1);
  }
  if (!cos && (positions || options_.rotary_interleaved)) {
    return Status::error("%s has no effect without cos and sin; give both, or leave it out",
                         positions ? positions.name : "attribute rotary_interleaved=1");
  }
  NSQ_TRY(expect_shape(positions, {batch, tokens}));
  call->position_ids = positions.as<int64_t>();

  const Tensor &bias = inputs[kBias], &sink = inputs[kHeadSink];
  if (bias) {
    NSQ_TRY(expect_shape(bias, {-1, -1, tokens, -1}));
    if ((bias.dim(0) != 1 && bias.dim(0) != batch) ||
        (bias.dim(1) != 1 && bias.dim(1) != options_.heads)) {
      return Status::error("attention_bias is for %lld rows and %lld heads; expected 1 or %lld, "
                           "and 1 or %lld", shown(bias.dim(0)), shown(bias.dim(1)), shown(batch),
                           shown(options_.heads));
    }
    call->bias = bias.data;
    call->bias_batch = bias.dim(0);
    call->bias_heads = bias.dim(1);
    call->bias_tokens = bias.dim(3);
  }
  if (!sink) return Status();
  NSQ_TRY(expect_shape(sink, {options_.heads}));
  if (options_.smooth_softmax) {
    return Status::error("head_sink is given with attribute smooth_softmax=1, which is a sink of 0 "
                         "for all heads; use one of the two");
  }
  for (int64_t head = 0; head < options_.heads; ++head) {
    float logit = 0;
    kernels_->widen(sink.as<uint8_t>() + head * size_of(sink.element), call->dtype, 1, &logit);
    if (logit < std::numeric_limits<float>::infinity()) continue;
    return Status::error("head_sink[%lld] is %g; a sink is finite, or -infinity for none",
                         shown(head), static_cast<double>(logit));
  }
  call->head_sink = sink.data;
  return Status();
}

Status AttentionNode::begin(const Tensor* inputs, const Tensor* feedback,
                            const Threads* threads, AttentionCall* call) const {
  call->kernels = kernels_;
  call->exact = exact_;
  call->threads = threads;
  call->options = options_;
  call->key.name = "key";
  call->key.scheme = key_;
  call->value.name = "value";
  call->value.scheme = value_;
  NSQ_TRY(check_new_tokens(inputs, call));
  NSQ_TRY(call->key_feedback.read(feedback[0], feedback[1], options_.kv_heads,
                                  call->key.head_dim));
  return check_options(inputs, call);
}

Status AttentionNode::make_new_outputs(Context& context, AttentionCall* call,
                                       Tensor* outputs) const {
  const int64_t channels = options_.heads * call->value.head_dim;
  NSQ_TRY(context.output(kOutput, {call->batch, call->tokens, channels}, &outputs[kOutput]));
  NSQ_TRY(context.output(kPresentLengths, {call->batch}, &outputs[kPresentLengths]));
  for (int i : {kOutput, kPresentLengths}) {
    if (!outputs[i]) return Status::error("%s is not connected", outputs[i].name);
  }
  call->output = outputs[kOutput].data;
  call->present_lengths = outputs[kPresentLengths].as<int64_t>();
  return Status();
}

}  // namespace nsq
