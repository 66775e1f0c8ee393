// What Quantize gives and Dequantize takes: the parts of the blocks of all sequences, and how the
// work on them is shared between threads.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "operators/operators.h"
#include "runtime/context.h"

namespace nsq {

enum Part { kPacked, kScale, kNorm, kZero, kOutlierIndex, kOutliers, kSinks, kParts };

constexpr Parameter kPartParameters[kParts] = {
    {"packed", Element::uint8},
    {"scale", Element::float32},
    {"norm", Element::float32, kOptional},
    {"zero", Element::float32, kOptional},
    {"outlier_index", Element::int32, kOptional},
    {"outliers", Element::float16, kOptional},
    {"sinks", varying(0), kOptional},  // of x's type
};

bool is_stored(const Scheme& scheme, int part);

// Sizes that follow from the scheme and from the shape of x[..., tokens, head_dim].
struct Layout {
  int64_t sequences;
  int64_t tokens;
  int64_t head_dim;
  int64_t sinks;   // K1
  int64_t coded;   // tokens after the sinks
  int64_t block;   // tokens of a block (B1)
  int64_t blocks;  // of one sequence
  int64_t kept;    // outlier channels (O1)
  int64_t row_bytes;

  Layout(const Scheme& scheme, int64_t sequences, int64_t tokens, int64_t head_dim);
};

// The axes of a tensor in front of its last two, and others behind them.
struct Shape {
  int64_t dims[Tensor::max_rank] = {};
  int rank = 0;

  Shape(const Tensor& leading, std::initializer_list<int64_t> others);
  // Of a part.
  Shape(const Tensor& leading, const Scheme& scheme, const Layout& layout, int part);
};

// [..., tokens, channels], neither of these empty but perhaps the tokens.
Status expect_axes(const Tensor& tensor, bool tokens_needed);
Status expect_channels(const char* name, int64_t channels);
int64_t count_sequences(const Tensor& tensor);

// The blocks of all sequences; parts that are not stored are null.
Block block_of(const Tensor* parts);

// Tokens of one block; `first` counts from the sinks. None if tokens is below 1.
struct Run {
  int64_t sequence, first, tokens;
};

// Runs of tokens that can be coded apart from one another; a task does a range of them.
class Runs {
 public:
  // Of about as many tokens as make a task, or of whole blocks.
  Runs(const Scheme& scheme, const Layout& layout, bool whole_blocks);

  int64_t tokens() const { return tokens_; }  // of a run, at most
  int64_t tasks() const { return tasks_; }
  int64_t first_of(int64_t task) const;
  Run at(int64_t number) const;
  Block part(const Block& all, const Run& run) const;

 private:
  const Scheme& scheme_;
  const Layout& layout_;
  int64_t tokens_, per_block_, count_, tasks_;
};

}  // namespace nsq
