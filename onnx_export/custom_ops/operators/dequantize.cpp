// nsq.Dequantize.
#include <cstring>

#include "kernels/choose.h"
#include "operators/codec_parts.h"

namespace nsq {
namespace {

constexpr int kHeadDim = kParts, kInputs = kParts + 1;  // behind the parts
constexpr Parameter kHeadDimParameter[] = {{"head_dim", Element::int64, kOptional}};

struct Dequantize {
  static constexpr const char* name = "Dequantize";
  static constexpr TypeChoices types[] = {{Element::float32}};
  static constexpr auto inputs = joined(kPartParameters, kHeadDimParameter);
  static constexpr Parameter outputs[] = {{"x_hat", Element::float32}};

  Status create(const Attributes& attributes) {
    NSQ_TRY(choose_kernels(&kernels_));
    return read_scheme(attributes, &scheme_);
  }

  Status compute(Context& context) const;

 private:
  Status find_head_dim(const Tensor* parts, int64_t* head_dim) const;
  Status find_tokens(const Tensor* parts, int64_t* tokens) const;
  Status check(const Tensor* parts, const Layout& layout) const;

  const Kernels* kernels_ = nullptr;
  Scheme scheme_;
};

Status Dequantize::find_head_dim(const Tensor* parts, int64_t* head_dim) const {
  const Tensor &given = parts[kHeadDim], &scale = parts[kScale];
  if (given) {
    if (given.element_count() != 1) {
      return Status::error("head_dim has %lld elements; give one number",
                           shown(given.element_count()));
    }
    *head_dim = *given.as<int64_t>();
    return expect_channels(given.name, *head_dim);
  }
  if (scheme_.per_token) {
    return Status::error("head_dim is left out; scales of tokens do not tell it, pass it");
  }
  if (scale.rank < 1) return expect_rank(scale, parts[kPacked].rank);
  *head_dim = scale.dim(-1);
  return expect_channels(scale.name, *head_dim);
}

// With the sinks, of which there are fewer than the scheme says only if all tokens are.
Status Dequantize::find_tokens(const Tensor* parts, int64_t* tokens) const {
  const Tensor &packed = parts[kPacked], &sinks = parts[kSinks];
  *tokens = packed.dim(-2);
  if (!sinks) return expect_axes(packed, true);
  if (sinks.rank != packed.rank) return expect_rank(sinks, packed.rank);
  const int64_t count = sinks.dim(-2);
  const bool fits = *tokens > 0 ? count == scheme_.sink_tokens
                                : count >= 1 && count <= scheme_.sink_tokens;
  if (!fits) {
    return Status::error("sinks has %lld tokens beside %lld coded ones, which does not fit "
                         "sink_tokens=%lld",
                         shown(count), shown(*tokens), shown(scheme_.sink_tokens));
  }
  *tokens += count;
  return Status();
}

Status Dequantize::check(const Tensor* parts, const Layout& layout) const {
  for (int part : {kPacked, kScale, kZero, kNorm, kSinks, kOutlierIndex, kOutliers}) {
    const Shape shape(parts[kPacked], scheme_, layout, part);
    NSQ_TRY(expect_shape(parts[part], shape.dims, shape.rank));
  }
  const int32_t* channels = parts[kOutlierIndex].as<int32_t>();
  for (int64_t i = 0; i < parts[kOutlierIndex].element_count(); ++i) {
    const int64_t least = i % layout.kept == 0 ? 0 : int64_t{channels[i - 1]} + 1;
    if (channels[i] >= least && channels[i] < layout.head_dim) continue;
    return Status::error("outlier_index has channel %d at place %lld of a block; the channels of a "
                         "block ascend, and lie below head_dim=%lld",
                         channels[i], shown(i % layout.kept), shown(layout.head_dim));
  }
  return Status();
}

Status Dequantize::compute(Context& context) const {
  Tensor parts[kInputs];
  for (int i = 0; i < kInputs; ++i) NSQ_TRY(context.input(i, &parts[i]));
  NSQ_TRY(expect_present(parts[kPacked]));
  NSQ_TRY(expect_present(parts[kScale]));
  for (int part = 0; part < kParts; ++part) {
    NSQ_TRY(expect_stored(parts[part], is_stored(scheme_, part)));
  }
  const Tensor& packed = parts[kPacked];
  NSQ_TRY(expect_axes(packed, false));
  int64_t head_dim = 0, tokens = 0;
  NSQ_TRY(find_head_dim(parts, &head_dim));
  NSQ_TRY(find_tokens(parts, &tokens));
  const Layout layout(scheme_, count_sequences(packed), tokens, head_dim);
  NSQ_TRY(check(parts, layout));

  Tensor x_hat;
  const Shape shape(packed, {tokens, head_dim});
  NSQ_TRY(context.output(0, shape.dims, shape.rank, &x_hat));
  NSQ_TRY(expect_apart(&x_hat, 1, parts, kInputs));
  float* out = x_hat.as<float>();
  const int64_t sinks = layout.sinks * head_dim;
  for (int64_t sequence = 0; sequence < layout.sequences && sinks > 0; ++sequence) {
    memcpy(out + sequence * tokens * head_dim, parts[kSinks].as<float>() + sequence * sinks,
           static_cast<size_t>(sinks) * sizeof(float));
  }
  const Block all = block_of(parts);
  const Runs runs(scheme_, layout, false);
  return context.threads().parallel_for(runs.tasks(), [&](int64_t task) {
    for (int64_t number = runs.first_of(task); number < runs.first_of(task + 1); ++number) {
      const Run run = runs.at(number);
      if (run.tokens < 1) continue;
      const int64_t token = run.sequence * tokens + layout.sinks + run.first;
      kernels_->decode_block(scheme_, runs.part(all, run), run.tokens, head_dim,
                             out + token * head_dim);
    }
  });
}

}  // namespace

const Variants dequantize_operator = define_operator<Dequantize>();

}  // namespace nsq
