// New tokens, staged as float32: rotated, scaled, and looked at for what is not finite.
#include <cmath>

#include "attention/work.h"
#include "kernels/floats.h"

namespace nsq {
namespace {

constexpr int64_t kStagedTokens = 32;

// What is not finite.
struct Place {
  const char* name;  // null if all is finite
  int64_t row, token, head, channel;
};

// Rotates x[head_dim] to out; what is behind the pairs is copied.
void rotate(const float* x, const float* cos, const float* sin, int64_t half, bool interleaved,
            int64_t head_dim, float* out) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + apart];
    out[i * step] = a * cos[i] - b * sin[i];
    out[i * step + apart] = b * cos[i] + a * sin[i];
  }
  std::copy(x + 2 * half, x + head_dim, out + 2 * half);
}

bool stage_tokens(const Work& work, int64_t row, int64_t first, int64_t last, Place* refused) {
  const AttentionCall& call = work.call;
  if (first >= last) return true;
  const int64_t head_dim = call.key.head_dim, value_dim = call.value.head_dim;
  const int64_t heads = call.options.heads, half = call.rotary_half;
  const int64_t most = std::max(heads * head_dim, work.kv_heads * value_dim);
  Scratch<float> room;
  Scratch<uint16_t> narrowed;
  if (!room.allocate(most + head_dim + 2 * half).ok() || !narrowed.allocate(head_dim).ok()) {
    return false;
  }
  float* turned = room.data() + most;
  const float *cos = nullptr, *sin = nullptr;
  const auto rotated = [&](const float* x) -> const float* {
    if (cos == nullptr) return x;
    rotate(x, cos, sin, half, call.options.rotary_interleaved, head_dim, turned);
    if (call.dtype == Dtype::float32) return turned;
    work.kernels.narrow(turned, call.dtype, head_dim, narrowed.data());
    work.kernels.widen(narrowed.data(), call.dtype, head_dim, turned);
    return turned;
  };
  // All heads of one token; out_of(head) is where a head goes.
  const auto stage = [&](const char* name, const void* token, int64_t i, int64_t count,
                         int64_t channels, bool rotates, double factor, const auto& out_of) {
    const float* x = work.widened(token, count * channels, room.data());
    for (int64_t head = 0; head < count; ++head, x += channels) {
      const float* from = rotates ? rotated(x) : x;
      float* out = out_of(head);
      for (int64_t j = 0; j < channels; ++j) out[j] = static_cast<float>(from[j] * factor);
      const int64_t channel = first_not_finite(out, channels);
      if (channel < 0 || refused->name != nullptr) continue;
      *refused = {name, row, i, head, channel};
    }
  };
  const double scale = call.options.scale != 0 ? call.options.scale
                                                : 1 / std::sqrt(static_cast<double>(head_dim));
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = row * call.tokens + i;
    if (call.cos != nullptr) {
      const int64_t position =
          call.position_ids != nullptr ? call.position_ids[token] : work.rows[row].past + i;
      float* angles = turned + head_dim;
      cos = work.widened(at(call.cos, position * half, call.dtype), half, angles);
      sin = work.widened(at(call.sin, position * half, call.dtype), half, angles + half);
    }
    stage("query", at(call.query, token * call.query_stride, call.dtype), i, heads, head_dim,
          true, scale, [&](int64_t head) {
            const int64_t kv_head = row * work.kv_heads + head / work.group;
            const int64_t line = (kv_head * call.tokens + i) * work.group + head % work.group;
            return work.query.data() + line * head_dim;
          });
    for (const Side* side : {&call.key, &call.value}) {
      stage(side->name, at(side->tokens, token * side->stride, call.dtype), i, work.kv_heads,
            side->head_dim, side == &call.key, 1, [&](int64_t head) {
              return work.staged(*side, row * work.kv_heads + head) + i * side->head_dim;
            });
    }
  }
  return true;
}

}  // namespace

Status stage(Work& work) {
  const AttentionCall& call = work.call;
  const int64_t batch = call.batch, tokens = call.tokens;
  NSQ_TRY(work.query.allocate(batch * tokens, call.options.heads * call.key.head_dim));
  NSQ_TRY(work.key.allocate(batch * tokens, work.kv_heads * call.key.head_dim));
  NSQ_TRY(work.value.allocate(batch * tokens, work.kv_heads * call.value.head_dim));
  const int64_t runs = (tokens + kStagedTokens - 1) / kStagedTokens;
  Scratch<Place> refused;
  NSQ_TRY(refused.allocate(batch * runs));
  NSQ_TRY(work.parallel(batch * runs, [&](int64_t task) {
    const int64_t row = task / runs, first = task % runs * kStagedTokens;
    refused[task].name = nullptr;
    return stage_tokens(work, row, first, std::min(first + kStagedTokens, work.rows[row].added),
                        &refused[task]);
  }));
  for (int64_t task = 0; task < batch * runs; ++task) {
    const Place& place = refused[task];
    if (place.name == nullptr) continue;
    return Status::error("%s is not finite, or becomes so when rotated and scaled, at row %lld, "
                         "token %lld, head %lld, channel %lld (rule I2)", place.name,
                         shown(place.row), shown(place.token), shown(place.head),
                         shown(place.channel));
  }
  return Status();
}

}  // namespace nsq
