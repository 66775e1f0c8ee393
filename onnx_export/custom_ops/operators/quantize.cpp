// nsq.Quantize.
#include <cstring>

#include "kernels/choose.h"
#include "kernels/floats.h"
#include "operators/codec_parts.h"
#include "runtime/feedback.h"

namespace nsq {
namespace {

// The first run of a task that was refused, and why.
struct Problem {
  Refusal refusal;
  Run run;
};

// Such as x[0, 3].
Text place_of(const Tensor& x, int64_t sequence, int64_t token) {
  int64_t index[Tensor::max_rank];
  for (int axis = x.rank - 3; axis >= 0; --axis) {
    index[axis] = sequence % x.dims[axis];
    sequence /= x.dims[axis];
  }
  Text place;
  place.add("%s[", x.name);
  for (int axis = 0; axis < x.rank - 2; ++axis) place.add("%lld, ", shown(index[axis]));
  place.add("%lld]", shown(token));
  return place;
}

Status refused(const Scheme& scheme, const Layout& layout, const Tensor& x,
               const Problem& problem) {
  const Refusal& refusal = problem.refusal;
  // Of a channel's scale, the first token of its block is told, too.
  const bool is_channel = refusal.is_channel(scheme);
  const int64_t token = layout.sinks + problem.run.first + (is_channel ? 0 : refusal.token);
  const Text place = place_of(x, problem.run.sequence, token);
  if (is_channel) {
    return Status::error("channel %lld of the block from %s on: %s (rule %s)",
                         shown(refusal.token), place.text, refusal.reason, refusal.rule);
  }
  if (strcmp(refusal.rule, "memory") == 0) return Status::error("%s", refusal.reason);
  return Status::error("%s: %s (rule %s)", place.text, refusal.reason, refusal.rule);
}

struct Quantize {
  static constexpr const char* name = "Quantize";
  static constexpr TypeChoices types[] = {
      {Element::float32, Element::float16, Element::bfloat16}};
  static constexpr Parameter inputs[] = {{"x", varying(0)},
                                         {"order", Element::int32, kOptional},
                                         {"factor", Element::float32, kOptional}};
  static constexpr auto& outputs = kPartParameters;

  Status create(const Attributes& attributes) {
    NSQ_TRY(choose_kernels(&kernels_));
    return read_scheme(attributes, &scheme_);
  }

  Status compute(Context& context) const;

 private:
  Status keep_sinks(const Layout& layout, const Tensor& x, const Tensor& sinks) const;
  Status encode(const Threads& threads, const Layout& layout, const Tensor& x,
                const FeedbackOfHeads& feedback, const Block& all) const;
  Problem encode_runs(const Layout& layout, const Runs& runs, int64_t task, const Tensor& x,
                      const FeedbackOfHeads& feedback, const Block& all) const;

  const Kernels* kernels_ = nullptr;
  Scheme scheme_;
};

Status Quantize::compute(Context& context) const {
  Tensor inputs[3], parts[kParts];
  for (int i = 0; i < 3; ++i) NSQ_TRY(context.input(i, &inputs[i]));
  const Tensor &x = inputs[0], &order = inputs[1], &factor = inputs[2];
  NSQ_TRY(expect_present(x));
  NSQ_TRY(expect_axes(x, true));
  NSQ_TRY(expect_channels(x.name, x.dim(-1)));
  const Layout layout(scheme_, count_sequences(x), x.dim(-2), x.dim(-1));
  FeedbackOfHeads feedback;
  NSQ_TRY(feedback.read(order, factor, x.rank > 2 ? x.dim(-3) : 1, layout.head_dim));
  NSQ_TRY(feedback.check());
  for (int part = 0; part < kParts; ++part) {
    const Shape shape(x, scheme_, layout, part);
    NSQ_TRY(context.output(part, shape.dims, shape.rank, &parts[part]));
    NSQ_TRY(expect_stored(parts[part], is_stored(scheme_, part)));
  }
  NSQ_TRY(expect_apart(parts, kParts, inputs, 3));
  NSQ_TRY(keep_sinks(layout, x, parts[kSinks]));
  return encode(context.threads(), layout, x, feedback, block_of(parts));
}

// K1, and I2 for them.
Status Quantize::keep_sinks(const Layout& layout, const Tensor& x, const Tensor& sinks) const {
  if (layout.sinks == 0) return Status();
  const int64_t element = size_of(x.element), count = layout.sinks * layout.head_dim;
  Scratch<float> row;
  NSQ_TRY(row.allocate(layout.head_dim));
  for (int64_t sequence = 0; sequence < layout.sequences; ++sequence) {
    const uint8_t* from = x.as<uint8_t>() + sequence * layout.tokens * layout.head_dim * element;
    for (int64_t t = 0; t < layout.sinks; ++t) {
      kernels_->widen(from + t * layout.head_dim * element, dtype(x.element), layout.head_dim,
                      row.data());
      if (first_not_finite(row.data(), layout.head_dim) < 0) continue;
      return Status::error("%s: a value of this sink token is not finite; mask padding and mend "
                           "the values first (rule I2)", place_of(x, sequence, t).text);
    }
    memcpy(sinks.as<uint8_t>() + sequence * count * element, from,
           static_cast<size_t>(count * element));
  }
  return Status();
}

Status Quantize::encode(const Threads& threads, const Layout& layout, const Tensor& x,
                        const FeedbackOfHeads& feedback, const Block& all) const {
  // Tokens with scales of their own need not wait for the rest of their block.
  const Runs runs(scheme_, layout, !scheme_.per_token || layout.kept > 0);
  Scratch<Problem> problems;
  NSQ_TRY(problems.allocate(runs.tasks()));
  NSQ_TRY(threads.parallel_for(runs.tasks(), [&](int64_t task) {
    problems[task] = encode_runs(layout, runs, task, x, feedback, all);
  }));
  for (int64_t task = 0; task < runs.tasks(); ++task) {
    if (problems[task].refusal.rule) return refused(scheme_, layout, x, problems[task]);
  }
  return Status();
}

Problem Quantize::encode_runs(const Layout& layout, const Runs& runs, int64_t task,
                              const Tensor& x, const FeedbackOfHeads& feedback,
                              const Block& all) const {
  const bool is_wide = x.element == Element::float32;
  Scratch<float> wide;
  if (!is_wide && !wide.allocate(runs.tokens(), layout.head_dim).ok()) {
    return {{"memory", "no memory to widen a block to float32", 0}, {0, 0, 0}};
  }
  for (int64_t number = runs.first_of(task); number < runs.first_of(task + 1); ++number) {
    const Run run = runs.at(number);
    if (run.tokens < 1) continue;
    const int64_t token = run.sequence * layout.tokens + layout.sinks + run.first;
    const float* values = wide.data();
    if (is_wide) {
      values = x.as<float>() + token * layout.head_dim;
    } else {
      kernels_->widen(x.as<uint16_t>() + token * layout.head_dim, dtype(x.element),
                      run.tokens * layout.head_dim, wide.data());
    }
    const Refusal refusal =
        kernels_->encode_block(scheme_, values, run.tokens, layout.head_dim,
                               feedback.of(run.sequence), runs.part(all, run));
    if (refusal.rule) return {refusal, run};
  }
  return {};
}

}  // namespace

const Variants quantize_operator = define_operator<Quantize>();

}  // namespace nsq
