// nsq.Quantize and nsq.Dequantize: their tensors, and how the work is shared between threads.
#include <cstdio>
#include <cstring>

#include "kernels.h"
#include "operator.h"

namespace nsq {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 24;
constexpr int64_t kTaskElements = int64_t{1} << 14;  // enough work that handing it out costs little
constexpr int64_t kMostTasks = 1024;
constexpr bool kOptional = true;

// Sizes that follow from the scheme and from the shape of x[..., tokens, head_dim].
struct Layout {
  int64_t sequences = 1;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  int64_t sinks = 0;   // K1
  int64_t coded = 0;   // tokens after the sinks
  int64_t block = 1;   // tokens of a block (B1)
  int64_t blocks = 0;  // of one sequence
  int64_t kept = 0;    // outlier channels (O1)
  int64_t row_bytes = 0;

  Layout(const Scheme& scheme, int64_t sequences_, int64_t tokens_, int64_t head_dim_)
      : sequences(sequences_), tokens(tokens_), head_dim(head_dim_) {
    sinks = scheme.sink_tokens < tokens ? scheme.sink_tokens : tokens;
    coded = tokens - sinks;
    block = scheme.block_size > 0 && scheme.block_size < coded ? scheme.block_size : coded;
    if (block == 0) block = 1;
    blocks = coded / block + (coded % block != 0);
    kept = scheme.outlier_channels < head_dim ? scheme.outlier_channels : head_dim;
    row_bytes = scheme.row_bytes(head_dim);
  }
};

// Runs of tokens that can be coded apart from one another, each within a block.
struct Runs {
  int64_t tokens;     // of a run
  int64_t per_block;  // runs
  int64_t count;

  Runs(const Layout& layout, int64_t tokens_)
      : tokens(tokens_),
        per_block(layout.block / tokens + (layout.block % tokens != 0)),
        count(layout.sequences * layout.blocks * per_block) {}
};

struct Run {
  int64_t sequence, first, tokens;  // `first` counts from the sinks; none if tokens is below 1
};

Run run_at(const Layout& layout, const Runs& runs, int64_t number) {
  const int64_t block = number / runs.per_block, in_sequence = block % layout.blocks;
  const int64_t start = in_sequence * layout.block, offset = number % runs.per_block * runs.tokens;
  int64_t end = layout.coded - start < layout.block ? layout.coded - start : layout.block;
  if (end - offset > runs.tokens) end = offset + runs.tokens;
  return {block / layout.blocks, start + offset, end - offset};
}

// About as many tokens as make a task.
int64_t tokens_per_task(const Layout& layout) {
  const int64_t tokens = kTaskElements / layout.head_dim + 1;
  return tokens < layout.block ? tokens : layout.block;
}

// The parts of a run, of those of all sequences.
Block parts_of(const Block& all, const Scheme& scheme, const Layout& layout, const Run& run) {
  const int64_t token = run.sequence * layout.coded + run.first;
  const int64_t block = run.sequence * layout.blocks + run.first / layout.block;
  const int64_t scale = scheme.per_token ? token : block * layout.head_dim;
  return {all.packed + token * layout.row_bytes,
          all.norm ? all.norm + token : nullptr,
          all.scale + scale,
          all.zero ? all.zero + scale : nullptr,
          all.outlier_index ? all.outlier_index + block * layout.kept : nullptr,
          all.outliers ? all.outliers + token * layout.kept : nullptr};
}

// A task does a range of runs.
int64_t count_tasks(const Layout& layout, const Runs& runs) {
  const int64_t elements = layout.head_dim * runs.tokens;
  const int64_t runs_per_task = elements < kTaskElements ? kTaskElements / elements : 1;
  const int64_t tasks = runs.count / runs_per_task + (runs.count % runs_per_task != 0);
  return tasks < kMostTasks ? tasks : kMostTasks;
}

int64_t first_of_task(const Runs& runs, int64_t tasks, int64_t task) {
  const int64_t each = runs.count / tasks, rest = runs.count % tasks;
  return task * each + (task < rest ? task : rest);
}

// The axes in front of the tokens, and others behind them.
struct Shape {
  int64_t dims[Tensor::max_rank] = {};
  int rank = 0;

  Shape(const Tensor& leading, int leading_rank, std::initializer_list<int64_t> others) {
    for (; rank < leading_rank; ++rank) dims[rank] = leading.dims[rank];
    for (int64_t dim : others) dims[rank++] = dim;
  }
};

Status expect_shape(const Tensor& tensor, const Shape& shape) {
  return expect_shape(tensor, shape.dims, shape.rank);
}

// The tensor must be there exactly if the scheme stores it.
Status expect_stored(const Tensor& tensor, bool stored) {
  if (tensor.present == stored) return Status();
  return Status::error(stored ? "%s is left out, but the scheme of the attributes stores it"
                              : "%s is not stored by the scheme of the attributes; leave it out",
                       tensor.name);
}

// [..., tokens, more], neither of these empty but perhaps the tokens.
Status expect_axes(const Tensor& tensor, bool tokens_needed) {
  if (tensor.rank < 2) {
    return Status::error("%s has %d axes; at least two are needed, tokens and channels",
                         tensor.name, tensor.rank);
  }
  for (int axis = tensor.rank - 2; axis < tensor.rank; ++axis) {
    if (tensor.dims[axis] > 0 || (axis == tensor.rank - 2 && !tokens_needed)) continue;
    return Status::error("axis %d of %s is empty; leave such arrays out", axis, tensor.name);
  }
  return Status();
}

Status expect_channels(const char* name, int64_t channels) {
  if (channels >= 1 && channels <= kMostChannels) return Status();
  return Status::error("%s asks for %lld channels; 1 to %lld are supported", name,
                       static_cast<long long>(channels), static_cast<long long>(kMostChannels));
}

int64_t count_sequences(const Tensor& tensor) {
  int64_t sequences = 1;
  for (int axis = 0; axis < tensor.rank - 2; ++axis) sequences *= tensor.dims[axis];
  return sequences;
}

// --- Quantize ------------------------------------------------------------------------------------

// The first run of a task that was refused, and why.
struct Problem {
  Refusal refusal;
  Run run;
};

// x[0, 3], or what part of it.
struct Place {
  Place(const Tensor& x, int64_t sequence, const char* format, int64_t number) {
    int64_t index[Tensor::max_rank];
    for (int axis = x.rank - 3; axis >= 0; --axis) {
      index[axis] = sequence % x.dims[axis];
      sequence /= x.dims[axis];
    }
    add("%s[", x.name);
    for (int axis = 0; axis < x.rank - 2; ++axis) {
      add("%lld, ", static_cast<long long>(index[axis]));
    }
    add(format, static_cast<long long>(number));
  }

  char text[192] = "";

 private:
  template <typename Value>
  void add(const char* format, Value value) {
    const size_t used = strlen(text);
    std::snprintf(text + used, sizeof(text) - used, format, value);
  }
};

Status refused(const Scheme& scheme, const Layout& layout, const Tensor& x,
               const Problem& problem) {
  const Refusal& refusal = problem.refusal;
  // Of a channel's scale, the first token of its block is told, too.
  const bool is_channel = !scheme.per_token && strcmp(refusal.rule, "S5") == 0;
  const int64_t token = layout.sinks + problem.run.first + (is_channel ? 0 : refusal.token);
  const Place place(x, problem.run.sequence, "%lld]", token);
  if (is_channel) {
    return Status::error("channel %lld of the block from %s on: %s (rule %s)",
                         static_cast<long long>(refusal.token), place.text, refusal.reason,
                         refusal.rule);
  }
  if (strcmp(refusal.rule, "memory") == 0) return Status::error("%s", refusal.reason);
  return Status::error("%s: %s (rule %s)", place.text, refusal.reason, refusal.rule);
}

struct Quantize {
  static constexpr const char* name = "Quantize";
  static constexpr TypeChoices types[] = {
      {Element::float32, Element::float16, Element::bfloat16}};
  static constexpr Parameter inputs[] = {{"x", varying(0)}};
  static constexpr Parameter outputs[] = {
      {"packed", Element::uint8},
      {"scale", Element::float32},
      {"norm", Element::float32, kOptional},
      {"zero", Element::float32, kOptional},
      {"outlier_index", Element::int32, kOptional},
      {"outliers", Element::float16, kOptional},
      {"sinks", varying(0), kOptional},
  };

  Status create(const Attributes& attributes) {
    NSQ_TRY(choose_kernels(&kernels_));
    return attributes.get("", &scheme_);
  }

  Status compute(Context& context) const;

 private:
  Status make_outputs(Context& context, const Layout& layout, const Tensor& x, Block* all,
                      Tensor* sinks) const;
  Status keep_sinks(const Layout& layout, const Tensor& x, const Tensor& sinks) const;
  Status encode(const Context& context, const Layout& layout, const Tensor& x,
                const Block& all) const;
  Problem encode_runs(const Layout& layout, const Runs& runs, const Tensor& x, const Block& all,
                      int64_t first, int64_t last) const;

  const Kernels* kernels_ = nullptr;
  Scheme scheme_;
};

Status Quantize::compute(Context& context) const {
  Tensor x, sinks;
  NSQ_TRY(context.input(0, &x));
  NSQ_TRY(expect_present(x));
  NSQ_TRY(expect_axes(x, true));
  NSQ_TRY(expect_channels(x.name, x.dim(-1)));
  const Layout layout(scheme_, count_sequences(x), x.dim(-2), x.dim(-1));
  Block all = {};
  NSQ_TRY(make_outputs(context, layout, x, &all, &sinks));
  NSQ_TRY(keep_sinks(layout, x, sinks));
  return encode(context, layout, x, all);
}

Status Quantize::make_outputs(Context& context, const Layout& layout, const Tensor& x, Block* all,
                              Tensor* sinks) const {
  const int leading = x.rank - 2;
  const Shape scales = scheme_.per_token ? Shape(x, leading, {layout.coded, 1})
                                         : Shape(x, leading, {layout.blocks, layout.head_dim});
  const Shape shapes[] = {
      Shape(x, leading, {layout.coded, layout.row_bytes}),
      scales,
      Shape(x, leading, {layout.coded}),
      scales,
      Shape(x, leading, {layout.blocks, layout.kept}),
      Shape(x, leading, {layout.coded, layout.kept}),
      Shape(x, leading, {layout.sinks, layout.head_dim}),
  };
  const bool with_outliers = scheme_.outlier_channels > 0;
  const bool stored[] = {true,          true,          scheme_.separate_norm,  !scheme_.symmetric,
                         with_outliers, with_outliers, scheme_.sink_tokens > 0};
  Tensor parts[7];
  for (int i = 0; i < 7; ++i) {
    NSQ_TRY(context.output(i, shapes[i].dims, shapes[i].rank, &parts[i]));
    NSQ_TRY(expect_stored(parts[i], stored[i]));
  }
  NSQ_TRY(expect_apart(parts, 7, &x, 1));
  *all = {parts[0].as<uint8_t>(), parts[2] ? parts[2].as<float>() : nullptr, parts[1].as<float>(),
          parts[3] ? parts[3].as<float>() : nullptr,
          parts[4] ? parts[4].as<int32_t>() : nullptr,
          parts[5] ? parts[5].as<uint16_t>() : nullptr};
  *sinks = parts[6];
  return Status();
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
      for (int64_t j = 0; j < layout.head_dim; ++j) {
        if (row[j] - row[j] == 0) continue;  // NaN if row[j] is not finite
        return Status::error("%s: a value of this sink token is not finite; mask padding and mend "
                             "the values first (rule I2)",
                             Place(x, sequence, "%lld]", t).text);
      }
    }
    memcpy(sinks.as<uint8_t>() + sequence * count * element, from,
           static_cast<size_t>(count * element));
  }
  return Status();
}

Status Quantize::encode(const Context& context, const Layout& layout, const Tensor& x,
                        const Block& all) const {
  // Tokens with scales of their own need not wait for the rest of their block.
  const bool apart = scheme_.per_token && layout.kept == 0;
  const Runs runs(layout, apart ? tokens_per_task(layout) : layout.block);
  const int64_t tasks = count_tasks(layout, runs);
  Scratch<Problem> problems;
  NSQ_TRY(problems.allocate(tasks));
  NSQ_TRY(context.parallel_for(tasks, [&](int64_t task) {
    problems[task] = encode_runs(layout, runs, x, all, first_of_task(runs, tasks, task),
                                 first_of_task(runs, tasks, task + 1));
  }));
  for (int64_t task = 0; task < tasks; ++task) {
    if (problems[task].refusal.rule) return refused(scheme_, layout, x, problems[task]);
  }
  return Status();
}

Problem Quantize::encode_runs(const Layout& layout, const Runs& runs, const Tensor& x,
                              const Block& all, int64_t first, int64_t last) const {
  const bool is_wide = x.element == Element::float32;
  Scratch<float> wide;
  if (!is_wide && !wide.allocate(runs.tokens, layout.head_dim).ok()) {
    return {{"memory", "no memory to widen a block to float32", 0}, {0, 0, 0}};
  }
  for (int64_t number = first; number < last; ++number) {
    const Run run = run_at(layout, runs, number);
    if (run.tokens < 1) continue;
    const int64_t token = run.sequence * layout.tokens + layout.sinks + run.first;
    const float* values = wide.data();
    if (is_wide) {
      values = x.as<float>() + token * layout.head_dim;
    } else {
      kernels_->widen(x.as<uint16_t>() + token * layout.head_dim, dtype(x.element),
                      run.tokens * layout.head_dim, wide.data());
    }
    const Refusal refusal = kernels_->encode_block(scheme_, values, run.tokens, layout.head_dim,
                                                   parts_of(all, scheme_, layout, run));
    if (refusal.rule) return {refusal, run};
  }
  return {};
}

// --- Dequantize ----------------------------------------------------------------------------------

struct Dequantize {
  static constexpr const char* name = "Dequantize";
  static constexpr TypeChoices types[] = {{Element::float32}};
  static constexpr Parameter inputs[] = {
      {"packed", Element::uint8},
      {"scale", Element::float32},
      {"norm", Element::float32, kOptional},
      {"zero", Element::float32, kOptional},
      {"outlier_index", Element::int32, kOptional},
      {"outliers", Element::float16, kOptional},
      {"sinks", Element::float32, kOptional},
      {"head_dim", Element::int64, kOptional},
  };
  static constexpr Parameter outputs[] = {{"x_hat", Element::float32}};

  Status create(const Attributes& attributes) {
    NSQ_TRY(choose_kernels(&kernels_));
    return attributes.get("", &scheme_);
  }

  Status compute(Context& context) const;

 private:
  enum Input { kPacked, kScale, kNorm, kZero, kOutlierIndex, kOutliers, kSinks, kHeadDim, kInputs };

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
                           static_cast<long long>(given.element_count()));
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
                         static_cast<long long>(count), static_cast<long long>(*tokens),
                         static_cast<long long>(scheme_.sink_tokens));
  }
  *tokens += count;
  return Status();
}

Status Dequantize::check(const Tensor* parts, const Layout& layout) const {
  const Tensor& packed = parts[kPacked];
  const int leading = packed.rank - 2;
  NSQ_TRY(expect_shape(packed, Shape(packed, leading, {layout.coded, layout.row_bytes})));
  for (int scale : {kScale, kZero}) {
    if (!parts[scale]) continue;
    NSQ_TRY(expect_shape(parts[scale], scheme_.per_token
                                           ? Shape(packed, leading, {layout.coded, 1})
                                           : Shape(packed, leading,
                                                   {layout.blocks, layout.head_dim})));
  }
  if (parts[kNorm]) NSQ_TRY(expect_shape(parts[kNorm], Shape(packed, leading, {layout.coded})));
  if (parts[kSinks]) {
    NSQ_TRY(expect_shape(parts[kSinks], Shape(packed, leading, {layout.sinks, layout.head_dim})));
  }
  if (layout.kept == 0) return Status();
  const Tensor& index = parts[kOutlierIndex];
  NSQ_TRY(expect_shape(index, Shape(packed, leading, {layout.blocks, layout.kept})));
  NSQ_TRY(expect_shape(parts[kOutliers], Shape(packed, leading, {layout.coded, layout.kept})));
  const int32_t* channels = index.as<int32_t>();
  for (int64_t i = 0; i < index.element_count(); ++i) {
    const int64_t least = i % layout.kept == 0 ? 0 : int64_t{channels[i - 1]} + 1;
    if (channels[i] >= least && channels[i] < layout.head_dim) continue;
    return Status::error("outlier_index has channel %d at place %lld of a block; the channels of a "
                         "block ascend, and lie below head_dim=%lld",
                         channels[i], static_cast<long long>(i % layout.kept),
                         static_cast<long long>(layout.head_dim));
  }
  return Status();
}

Status Dequantize::compute(Context& context) const {
  Tensor parts[kInputs];
  for (int i = 0; i < kInputs; ++i) NSQ_TRY(context.input(i, &parts[i]));
  NSQ_TRY(expect_present(parts[kPacked]));
  NSQ_TRY(expect_present(parts[kScale]));
  NSQ_TRY(expect_stored(parts[kNorm], scheme_.separate_norm));
  NSQ_TRY(expect_stored(parts[kZero], !scheme_.symmetric));
  NSQ_TRY(expect_stored(parts[kOutlierIndex], scheme_.outlier_channels > 0));
  NSQ_TRY(expect_stored(parts[kOutliers], scheme_.outlier_channels > 0));
  NSQ_TRY(expect_stored(parts[kSinks], scheme_.sink_tokens > 0));
  const Tensor& packed = parts[kPacked];
  NSQ_TRY(expect_axes(packed, false));
  int64_t head_dim = 0, tokens = 0;
  NSQ_TRY(find_head_dim(parts, &head_dim));
  NSQ_TRY(find_tokens(parts, &tokens));
  const Layout layout(scheme_, count_sequences(packed), tokens, head_dim);
  NSQ_TRY(check(parts, layout));

  Tensor x_hat;
  const Shape shape(packed, packed.rank - 2, {tokens, head_dim});
  NSQ_TRY(context.output(0, shape.dims, shape.rank, &x_hat));
  NSQ_TRY(expect_apart(&x_hat, 1, parts, kInputs));
  float* out = x_hat.as<float>();
  const int64_t sinks = layout.sinks * head_dim;
  for (int64_t sequence = 0; sequence < layout.sequences && sinks > 0; ++sequence) {
    memcpy(out + sequence * tokens * head_dim, parts[kSinks].as<float>() + sequence * sinks,
           static_cast<size_t>(sinks) * sizeof(float));
  }
  const Block all = {packed.as<uint8_t>(), parts[kNorm].as<float>(), parts[kScale].as<float>(),
                     parts[kZero].as<float>(), parts[kOutlierIndex].as<int32_t>(),
                     parts[kOutliers].as<uint16_t>()};
  const Runs runs(layout, tokens_per_task(layout));
  const int64_t tasks = count_tasks(layout, runs);
  return context.parallel_for(tasks, [&](int64_t task) {
    const int64_t last = first_of_task(runs, tasks, task + 1);
    for (int64_t number = first_of_task(runs, tasks, task); number < last; ++number) {
      const Run run = run_at(layout, runs, number);
      if (run.tokens < 1) continue;
      const int64_t token = run.sequence * tokens + layout.sinks + run.first;
      kernels_->decode_block(scheme_, parts_of(all, scheme_, layout, run), run.tokens, head_dim,
                             out + token * head_dim);
    }
  });
}

}  // namespace

extern const Variants quantize_operator;
extern const Variants dequantize_operator;
const Variants quantize_operator = define_operator<Quantize>();
const Variants dequantize_operator = define_operator<Dequantize>();

}  // namespace nsq
