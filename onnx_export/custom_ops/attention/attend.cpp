// Attending: scores, weights and outputs of all queries over all tokens (A1 to A3).
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/plan.h"

namespace nsq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Some queries of a task and a tile of tokens, from position `low` to `high`.
struct Pass {
  const Work& work;
  Queries queries;
  int64_t low, high;
  Workspace& space;
  Partial result;

  int64_t rows() const { return queries.count * work.group; }
  // The next tokens from `first` on: all, if they are decoded.
  Piece piece(const Tokens& tokens, const float* decoded, int64_t first) const {
    if (decoded != nullptr) return {high - first, decoded, {}};
    return piece_at(work, tokens, first, high, space.room);
  }
};

void score(const Pass& pass, const Tokens& keys, const float* decoded) {
  const Kernels& kernels = pass.work.kernels;
  const int64_t head_dim = keys.side->head_dim, rows = pass.rows();
  const float* queries = pass.queries.rows;
  for (int64_t first = pass.low; first < pass.high;) {
    const Piece piece = pass.piece(keys, decoded, first);
    float* scores = pass.space.scores + (first - pass.low);
    if (piece.floats != nullptr) {
      kernels.score_floats(piece.floats, piece.tokens, head_dim, queries, rows, scores, kStride);
    } else {
      kernels.score_codes(keys.side->scheme, piece.block, piece.tokens, head_dim, queries, rows,
                          scores, kStride);
    }
    first += piece.tokens;
  }
}

void add_bias(const Pass& pass, int64_t r, int64_t low, int64_t high, float* scores) {
  const Work& work = pass.work;
  const AttentionCall& call = work.call;
  const Queries& queries = pass.queries;
  const int64_t head = queries.head % work.kv_heads * work.group + r % work.group;
  const int64_t row = call.bias_batch > 1 ? queries.row : 0;
  const int64_t line = (row * call.bias_heads + (call.bias_heads > 1 ? head : 0)) *
                           call.tokens + queries.first + r / work.group;
  const float* bias = work.widened(at(call.bias, line * call.bias_tokens + low, call.dtype),
                              high - low, pass.space.bias);
  int spoilt = 0;
  for (int64_t t = 0; t < high - low; ++t) {
    scores[t] += bias[t];
    spoilt |= bias[t] < kInfinity ? 0 : 1;  // nor is NaN
  }
  if (spoilt != 0) work.bias_spoils = true;
}

// Turns scores of tokens [low, high) into weights relative to each row's maximum so far.
void weigh(const Pass& pass) {
  const auto& [work, queries, low, high, space, result] = pass;
  const AttentionOptions& options = work.call.options;
  for (int64_t r = 0; r < pass.rows(); ++r) {
    const int64_t position = queries.position + r / work.group;
    const int64_t from = std::max(low, work.first_seen(position));
    const int64_t to = options.causal ? std::min(high, position + 1) : high;
    float* scores = space.scores + r * kStride;
    const float most = result.most[r];
    float new_most = most;
    if (from < to) {
      float* seen = scores + (from - low);
      if (options.softcap > 0) work.kernels.cap(seen, to - from, options.softcap);
      if (work.call.bias != nullptr) add_bias(pass, r, from, to, seen);
      new_most = std::max(most, work.kernels.largest(seen, to - from));
    }
    if (!(from < to) || new_most == -kInfinity) {
      std::fill(scores, scores + (high - low), 0.0f);
      space.factors[r] = 1;
      continue;
    }
    std::fill(scores, scores + (from - low), 0.0f);
    std::fill(scores + (to - low), scores + (high - low), 0.0f);
    const float factor = most == new_most ? 1 : std::exp(most - new_most);
    result.total[r] = result.total[r] * factor +
                      work.kernels.exponentials(scores + (from - low), to - from, new_most);
    result.most[r] = new_most;
    space.factors[r] = factor;
  }
}

// Adds the values times their weights to the result.
void add(const Pass& pass, const Tokens& values, const float* decoded) {
  const auto& [work, queries, low, high, space, result] = pass;
  const int64_t value_dim = values.side->head_dim, rows = pass.rows();
  std::fill(space.sums, space.sums + rows * value_dim, 0.0f);
  for (int64_t r = 0; r < rows; ++r) result.roundings[r].rescale(space.factors[r]);
  for (int64_t first = low; first < high;) {
    const Piece piece = pass.piece(values, decoded, first);
    const float* weights = space.scores + (first - low);
    if (piece.floats != nullptr) {
      work.kernels.add_floats(piece.floats, piece.tokens, value_dim, weights, kStride, rows,
                              space.sums);
    } else {
      work.kernels.add_codes(values.side->scheme, piece.block, piece.tokens, value_dim, weights,
                             kStride, rows, result.roundings, space.sums);
    }
    first += piece.tokens;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = space.factors[r];
    float* out = result.output + r * value_dim;
    const float* sum = space.sums + r * value_dim;
    for (int64_t j = 0; j < value_dim; ++j) out[j] = out[j] * factor + sum[j];
  }
}

// A position at or below this one where a block of the keys begins, unless blocks are long.
int64_t block_start(const Scheme& scheme, int64_t position) {
  if (scheme.block_size > kTile || position <= scheme.sink_tokens) return position;
  return position - (position - scheme.sink_tokens) % scheme.block_size;
}

void attend_segment(const Work& work, const Plan& plan, const Queries& queries, int64_t segment,
                    Workspace& space, const Partial& result) {
  const AttentionCall& call = work.call;
  const int64_t head_dim = call.key.head_dim, value_dim = call.value.head_dim;
  const int64_t rows = queries.count * work.group;
  std::fill(result.most, result.most + rows, -kInfinity);
  std::fill(result.total, result.total + rows, 0.0f);
  std::fill(result.roundings, result.roundings + rows, Roundings());
  std::fill(result.output, result.output + rows * value_dim, 0.0f);
  const bool causal = call.options.causal;
  const int64_t low = work.first_seen(queries.position);
  const int64_t high = causal ? queries.position + queries.count : work.rows[queries.row].length;
  const auto edge = [&](int64_t number) {
    if (number == 0 || number == plan.segments) return number == 0 ? low : high;
    const int64_t position = block_start(call.key.scheme, low + number * plan.segment_tokens);
    return std::min(std::max(position, low), high);
  };
  const int64_t start = edge(segment), end = edge(segment + 1);
  const Tokens keys = tokens_of(work, call.key, queries.row, queries.head);
  const Tokens values = tokens_of(work, call.value, queries.row, queries.head);
  for (int64_t first = start, last; first < end; first = last) {
    const int64_t whole = block_start(call.key.scheme, first + kTile);
    last = std::min(whole > first ? whole : first + kTile, end);
    if (plan.decode_keys) load(work, keys, first, last, space.room, space.keys);
    if (plan.decode_values) load(work, values, first, last, space.room, space.values);
    for (int64_t i = 0; i < queries.count; i += plan.pass_queries) {
      Queries some = queries;
      some.first += i;
      some.count = std::min(plan.pass_queries, queries.count - i);
      some.position += i;
      some.rows += i * work.group * head_dim;
      const int64_t from = std::max(first, work.first_seen(some.position));
      const int64_t to = causal ? std::min(last, some.position + some.count) : last;
      if (from >= to) continue;
      const Pass pass = {work, some, from, to, space, result.from(i * work.group, value_dim)};
      score(pass, keys, plan.decode_keys ? space.keys + (from - first) * head_dim : nullptr);
      weigh(pass);
      add(pass, values, plan.decode_values ? space.values + (from - first) * value_dim : nullptr);
    }
  }
}

// Adds sums over other tokens to the result.
void merge(const Partial& other, const Partial& result, int64_t rows, int64_t value_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (other.most[r] == -kInfinity) continue;
    const float most = std::max(result.most[r], other.most[r]);
    const float own = std::exp(result.most[r] - most), others = std::exp(other.most[r] - most);
    float* out = result.output + r * value_dim;
    const float* more = other.output + r * value_dim;
    for (int64_t j = 0; j < value_dim; ++j) out[j] = out[j] * own + more[j] * others;
    result.total[r] = result.total[r] * own + other.total[r] * others;
    result.most[r] = most;
  }
}

// Turns sums over all tokens into outputs.
void finish(const Work& work, const Queries& queries, const Partial& result) {
  const AttentionCall& call = work.call;
  const AttentionOptions& options = call.options;
  const int64_t value_dim = call.value.head_dim;
  for (int64_t r = 0; r < queries.count * work.group; ++r) {
    const int64_t head = queries.head % work.kv_heads * work.group + r % work.group;
    const int64_t token = queries.row * call.tokens + queries.first + r / work.group;
    float sink = options.smooth_softmax ? 0 : -kInfinity, room;
    if (call.head_sink != nullptr) {
      sink = *work.widened(at(call.head_sink, head, call.dtype), 1, &room);
    }
    float total = result.total[r], factor = 1;
    const float most = result.most[r], larger = std::max(most, sink);
    if (most == -kInfinity) {
      total = 1;  // nothing is seen: 0
    } else if (sink != -kInfinity) {
      factor = std::exp(most - larger);
      total = total * factor + std::exp(sink - larger);
    }
    float* out = result.output + r * value_dim;
    for (int64_t j = 0; j < value_dim; ++j) out[j] = out[j] * factor / total;
    work.kernels.narrow(out, call.dtype, value_dim,
                    at(call.output, (token * options.heads + head) * value_dim, call.dtype));
  }
}

void clear_padding(const Work& work) {
  const AttentionCall& call = work.call;
  const int64_t channels = call.options.heads * call.value.head_dim;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t added = work.rows[b].added;
    std::memset(at(call.output, (b * call.tokens + added) * channels, call.dtype), 0,
                static_cast<size_t>((call.tokens - added) * channels * size_of(call.dtype)));
  }
}

}  // namespace

Status attend(const Work& work) {
  const Plan plan(work);
  const int64_t tiles = work.call.batch * work.kv_heads * plan.tiles;
  Scratch<float> partials;
  if (plan.segments > 1) NSQ_TRY(partials.allocate(tiles * plan.segments, plan.partial_size));
  clear_padding(work);
  NSQ_TRY(work.parallel(tiles * plan.segments, [&](int64_t task) {
    const Queries queries = queries_of(work, plan, task / plan.segments);
    if (queries.count <= 0) return true;
    Workspace space;
    if (!space.allocate(work, plan)) return false;
    const Partial result = plan.partial_at(
        plan.segments > 1 ? partials.data() + task * plan.partial_size : space.partial);
    attend_segment(work, plan, queries, task % plan.segments, space, result);
    if (plan.segments == 1) finish(work, queries, result);
    return true;
  }));
  if (plan.segments == 1) return Status();
  return work.parallel(tiles, [&](int64_t tile) {
    const Queries queries = queries_of(work, plan, tile);
    if (queries.count <= 0) return true;
    float* memory = partials.data() + tile * plan.segments * plan.partial_size;
    const Partial result = plan.partial_at(memory);
    for (int64_t segment = 1; segment < plan.segments; ++segment) {
      merge(plan.partial_at(memory + segment * plan.partial_size), result,
            queries.count * work.group, work.call.value.head_dim);
    }
    finish(work, queries, result);
    return true;
  });
}

}  // namespace nsq
