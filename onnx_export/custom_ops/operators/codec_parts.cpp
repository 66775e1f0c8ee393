#include "operators/codec_parts.h"

#include <algorithm>

namespace nsq {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 24;
constexpr int64_t kTaskElements = int64_t{1} << 14;  // enough work that handing it out costs little
constexpr int64_t kMostTasks = 1024;

int64_t divide_up(int64_t number, int64_t unit) { return number / unit + (number % unit != 0); }

}  // namespace

bool is_stored(const Scheme& scheme, int part) {
  switch (part) {
    case kNorm: return scheme.separate_norm;
    case kZero: return !scheme.symmetric;
    case kOutlierIndex:
    case kOutliers: return scheme.outlier_channels > 0;
    case kSinks: return scheme.sink_tokens > 0;
  }
  return true;
}

Layout::Layout(const Scheme& scheme, int64_t sequences, int64_t tokens, int64_t head_dim)
    : sequences(sequences), tokens(tokens), head_dim(head_dim) {
  sinks = std::min(scheme.sink_tokens, tokens);
  coded = tokens - sinks;
  block = scheme.block_size > 0 ? std::min(scheme.block_size, coded) : coded;
  if (block == 0) block = 1;
  blocks = divide_up(coded, block);
  kept = std::min(scheme.outlier_channels, head_dim);
  row_bytes = scheme.row_bytes(head_dim);
}

Shape::Shape(const Tensor& leading, std::initializer_list<int64_t> others) {
  for (; rank < leading.rank - 2; ++rank) dims[rank] = leading.dims[rank];
  for (int64_t dim : others) dims[rank++] = dim;
}

Shape::Shape(const Tensor& leading, const Scheme& scheme, const Layout& layout, int part)
    : Shape(leading, {layout.coded}) {
  switch (part) {
    case kPacked: dims[rank++] = layout.row_bytes; break;
    case kScale:
    case kZero:
      if (!scheme.per_token) dims[rank - 1] = layout.blocks;
      dims[rank++] = scheme.per_token ? 1 : layout.head_dim;
      break;
    case kOutlierIndex: dims[rank - 1] = layout.blocks; [[fallthrough]];
    case kOutliers: dims[rank++] = layout.kept; break;
    case kSinks:
      dims[rank - 1] = layout.sinks;
      dims[rank++] = layout.head_dim;
      break;
  }
}

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
  return Status::error("%s asks for %lld channels; 1 to %lld are supported", name, shown(channels),
                       shown(kMostChannels));
}

int64_t count_sequences(const Tensor& tensor) {
  int64_t sequences = 1;
  for (int axis = 0; axis < tensor.rank - 2; ++axis) sequences *= tensor.dims[axis];
  return sequences;
}

Block block_of(const Tensor* parts) {
  return {parts[kPacked].as<uint8_t>(), parts[kNorm].as<float>(), parts[kScale].as<float>(),
          parts[kZero].as<float>(), parts[kOutlierIndex].as<int32_t>(),
          parts[kOutliers].as<uint16_t>()};
}

Runs::Runs(const Scheme& scheme, const Layout& layout, bool whole_blocks)
    : scheme_(scheme),
      layout_(layout),
      tokens_(whole_blocks ? layout.block
                           : std::min(kTaskElements / layout.head_dim + 1, layout.block)),
      per_block_(divide_up(layout.block, tokens_)),
      count_(layout.sequences * layout.blocks * per_block_) {
  const int64_t each = std::max<int64_t>(kTaskElements / (layout.head_dim * tokens_), 1);
  tasks_ = std::min(divide_up(count_, each), kMostTasks);
}

int64_t Runs::first_of(int64_t task) const {
  return task * (count_ / tasks_) + std::min(task, count_ % tasks_);
}

Run Runs::at(int64_t number) const {
  const int64_t block = number / per_block_, offset = number % per_block_ * tokens_;
  const int64_t start = block % layout_.blocks * layout_.block;
  const int64_t end = std::min(layout_.coded - start, layout_.block);
  return {block / layout_.blocks, start + offset, std::min(end - offset, tokens_)};
}

Block Runs::part(const Block& all, const Run& run) const {
  const int64_t token = run.sequence * layout_.coded + run.first;
  const int64_t block = run.sequence * layout_.blocks + run.first / layout_.block;
  const int64_t scale = scheme_.per_token ? token : block * layout_.head_dim;
  return {all.packed + token * layout_.row_bytes,
          all.norm ? all.norm + token : nullptr,
          all.scale + scale,
          all.zero ? all.zero + scale : nullptr,
          all.outlier_index ? all.outlier_index + block * layout_.kept : nullptr,
          all.outliers ? all.outliers + token * layout_.kept : nullptr};
}

}  // namespace nsq
