// Attention on a quantized cache. New tokens are staged as float32, full blocks are sealed behind
// those of the past, all is attended, and only then are sinks and tail written: a call that fails
// leaves the past as it was, in place too.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

namespace nsq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A3: the most tokens in one sum. What is longer is added up tile by tile.
constexpr int64_t kTile = 512;
// Rows of scores must not be a multiple of a cache's period apart.
constexpr int64_t kStride = kTile + 16;
// Query rows (of a token, one for each head that shares keys) that are worth decoding a block for.
constexpr int64_t kManyRows = 256;
constexpr int64_t kPassRows = 128;   // rows whose scores are held at a time
constexpr int64_t kTaskRows = 1024;  // rows for which a block is decoded once
// Enough tasks for many threads; their number must not depend on that of the threads.
constexpr int64_t kTasks = 64;
constexpr int64_t kSegment = 2048;  // tokens that are worth a task
constexpr int64_t kStagedTokens = 32;

long long shown(int64_t number) { return static_cast<long long>(number); }

int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

// Calls task(number), which is false if it has no memory.
template <typename Task>
Status parallel(const Threads& threads, int64_t tasks, const Task& task) {
  struct Shared {
    const Task& task;
    std::atomic<bool> failed;
  } shared{task, {false}};
  if (tasks == 1) {
    shared.failed = !task(0);
  } else if (tasks > 1) {
    auto call = [](void* data, size_t number) {
      Shared& all = *static_cast<Shared*>(data);
      if (!all.task(static_cast<int64_t>(number))) all.failed = true;
    };
    NSQ_TRY(threads.run(threads.context, call, tasks, &shared));
  }
  return shared.failed ? Status::error("there is no memory for attention's intermediate results")
                       : Status();
}

const uint8_t* at(const void* array, int64_t element, Dtype dtype) {
  return static_cast<const uint8_t*>(array) + element * size_of(dtype);
}
uint8_t* at(void* array, int64_t element, Dtype dtype) {
  return static_cast<uint8_t*>(array) + element * size_of(dtype);
}

// --- where tokens lie ----------------------------------------------------------------------------

// One row of the batch.
struct Row {
  int64_t past, added, length;
};

// How a length is cut in sinks, sealed blocks and tail (docs/cache.md).
struct Cut {
  int64_t sinks, sealed, tail;
  int64_t tail_start() const { return sinks + sealed; }
};

Cut cut(const Scheme& scheme, int64_t length) {
  const int64_t sinks = std::min(scheme.sink_tokens, length);
  const int64_t sealed = (length - sinks) / scheme.block_size * scheme.block_size;
  return {sinks, sealed, length - sinks - sealed};
}

int64_t most_tokens(const Side& side) {
  return side.scheme.sink_tokens + side.capacity + side.scheme.block_size - 1;
}

// The elements at which a key/value head's parts begin, and those of a sealed token of it.
struct Places {
  int64_t packed, scale, norm, sinks, tail;
};

Places places(const Side& side, int64_t head, int64_t token) {
  const Scheme& scheme = side.scheme;
  const int64_t scale = scheme.per_token
      ? head * side.capacity + token
      : (head * (side.capacity / scheme.block_size) + token / scheme.block_size) * side.head_dim;
  return {(head * side.capacity + token) * scheme.row_bytes(side.head_dim), scale,
          head * side.capacity + token, head * scheme.sink_tokens * side.head_dim,
          head * scheme.block_size * side.head_dim};
}

// --- one call ------------------------------------------------------------------------------------

// New tokens as float32, key/value head by head, queries rotated and times the scale.
struct Staged {
  Scratch<float> query;  // [batch, kv_heads, tokens, group, head_dim]
  Scratch<float> key;    // [batch, kv_heads, tokens, head_dim], rotated and rounded to the dtype
  Scratch<float> value;
};

class Attention {
 public:
  explicit Attention(const AttentionCall& call)
      : call_(call),
        kernels_(*call.kernels),
        kv_heads_(call.options.kv_heads),
        group_(call.options.heads / call.options.kv_heads) {}

  Status run() {
    NSQ_TRY(read_lengths());
    NSQ_TRY(stage());
    NSQ_TRY(copy_past());
    NSQ_TRY(seal());
    NSQ_TRY(attend());
    NSQ_TRY(check_bias());
    write_tails();
    return Status();
  }

 private:
  struct Plan;
  struct Workspace;
  struct Tokens;
  struct Piece;
  struct Queries;
  struct Partial;
  struct Place;

  Status read_lengths();
  Status check_positions(int64_t row) const;
  Status check_bias() const;

  Status stage();
  bool stage_tokens(int64_t row, int64_t first, int64_t last, Place* refused);
  Status copy_past();
  void copy_head(const Side& side, int64_t row, int64_t head) const;
  Status seal();
  bool seal_block(const Side& side, int64_t row, int64_t head, int64_t number, Refusal* refusal);
  void write_tails() const;
  void write_tail(const Side& side, int64_t row, int64_t head) const;

  Status attend();
  Plan plan() const;
  bool allocate(const Plan& plan, Workspace* space) const;
  Queries queries_of(const Plan& plan, int64_t tile) const;
  Tokens tokens_of(const Side& side, int64_t row, int64_t head) const;
  Piece piece_at(const Tokens& tokens, int64_t first, int64_t last, Workspace& space) const;
  void load(const Tokens& tokens, int64_t first, int64_t last, Workspace& space, float* out) const;
  void clear_padding() const;
  void attend_segment(const Queries& queries, int64_t segment, const Plan& plan, Workspace& space,
                      const Partial& result) const;
  void score(const Queries& queries, const Tokens& keys, int64_t low, int64_t high,
             int64_t decoded, Workspace& space) const;
  void weigh(const Queries& queries, int64_t low, int64_t high, Workspace& space,
             const Partial& result) const;
  void add_bias(const Queries& queries, int64_t r, int64_t low, int64_t high, Workspace& space,
                float* scores) const;
  void add(const Queries& queries, const Tokens& values, int64_t low, int64_t high,
           int64_t decoded, Workspace& space, const Partial& result) const;
  void merge(const Queries& queries, const Partial& other, const Partial& result) const;
  void finish(const Queries& queries, const Partial& result) const;

  const float* staged(const Side& side) const {
    return &side == &call_.key ? staged_.key.data() : staged_.value.data();
  }
  const float* widened(const void* array, int64_t count, float* room) const {
    if (call_.dtype == Dtype::float32) return static_cast<const float*>(array);
    kernels_.widen(array, call_.dtype, count, room);
    return room;
  }
  int64_t first_seen(int64_t position) const {
    const int64_t window = call_.options.sliding_window;
    return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
  }

  const AttentionCall& call_;
  const Kernels& kernels_;
  const int64_t kv_heads_;
  const int64_t group_;  // query heads that share a key/value head
  Scratch<Row> rows_;
  Staged staged_;
  mutable std::atomic<bool> bias_spoils_{false};  // NaN or infinity was added to a score
};

// --- lengths and positions -----------------------------------------------------------------------

Status Attention::read_lengths() {
  NSQ_TRY(rows_.allocate(call_.batch));
  for (int64_t b = 0; b < call_.batch; ++b) {
    const int64_t past = call_.past_lengths[b];
    const int64_t added = call_.new_lengths != nullptr ? call_.new_lengths[b] : call_.tokens;
    if (added < 0 || added > call_.tokens) {
      return Status::error("new_lengths[%lld] is %lld; query has %lld tokens, so it lies between "
                           "0 and that", shown(b), shown(added), shown(call_.tokens));
    }
    for (const Side* side : {&call_.key, &call_.value}) {
      const int64_t most = most_tokens(*side);
      if (past < 0 || past > most) {
        return Status::error("past_lengths[%lld] is %lld; past_%s_packed and the other parts hold "
                             "0 to %lld tokens", shown(b), shown(past), side->name, shown(most));
      }
      if (added > most - past) {
        return Status::error(
            "past_lengths[%lld] is %lld, and %lld tokens more are beyond the %lld that "
            "past_%s_packed and the other parts hold; give the cache a larger capacity",
            shown(b), shown(past), shown(added), shown(most), side->name);
      }
    }
    rows_[b] = {past, added, past + added};
    if (call_.bias != nullptr && added > 0 && call_.bias_tokens < past + added) {
      return Status::error("attention_bias is for %lld tokens, but row %lld has %lld after the "
                           "append", shown(call_.bias_tokens), shown(b), shown(past + added));
    }
    if (call_.cos != nullptr) NSQ_TRY(check_positions(b));
  }
  return Status();
}

Status Attention::check_positions(int64_t row) const {
  const auto [past, added, length] = rows_[row];
  if (call_.position_ids == nullptr) {
    if (added == 0 || length <= call_.rotary_positions) return Status();
    return Status::error("cos has %lld positions, but row %lld needs position %lld",
                         shown(call_.rotary_positions), shown(row), shown(length - 1));
  }
  for (int64_t i = 0; i < added; ++i) {
    const int64_t position = call_.position_ids[row * call_.tokens + i];
    if (position < 0 || position >= call_.rotary_positions) {
      return Status::error("position_ids[%lld, %lld] is %lld; cos has %lld positions", shown(row),
                           shown(i), shown(position), shown(call_.rotary_positions));
    }
  }
  return Status();
}

// What was seen of the bias was looked at when it was added: here only the place is found.
Status Attention::check_bias() const {
  if (!bias_spoils_) return Status();
  const int64_t queries = call_.bias_batch * call_.bias_heads * call_.tokens;
  for (int64_t line = 0; line < queries; ++line) {
    const int64_t query = line % call_.tokens, head = line / call_.tokens % call_.bias_heads;
    const int64_t row = line / call_.tokens / call_.bias_heads;
    for (int64_t b = row; b < (call_.bias_batch > 1 ? row + 1 : call_.batch); ++b) {
      const int64_t position = rows_[b].past + query;
      const int64_t high = call_.options.causal ? position + 1 : rows_[b].length;
      for (int64_t t = first_seen(position); query < rows_[b].added && t < high; ++t) {
        float room;
        const float bias =
            *widened(at(call_.bias, line * call_.bias_tokens + t, call_.dtype), 1, &room);
        if (bias < kInfinity) continue;
        return Status::error("attention_bias[%lld, %lld, %lld, %lld] is %g; a bias is finite, or "
                             "-infinity where a token is hidden", shown(row), shown(head),
                             shown(query), shown(t), static_cast<double>(bias));
      }
    }
  }
  return Status();
}

// --- new tokens ----------------------------------------------------------------------------------

// What is not finite.
struct Attention::Place {
  const char* name;  // null if all is finite
  int64_t row, token, head, channel;
};

int64_t first_not_finite(const float* values, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    any |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  int64_t i = 0;
  if (any == 0) return count;
  while (std::isfinite(values[i])) ++i;
  return i;
}

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

Status Attention::stage() {
  const int64_t batch = call_.batch, tokens = call_.tokens;
  NSQ_TRY(staged_.query.allocate(batch * tokens, call_.options.heads * call_.key.head_dim));
  NSQ_TRY(staged_.key.allocate(batch * tokens, kv_heads_ * call_.key.head_dim));
  NSQ_TRY(staged_.value.allocate(batch * tokens, kv_heads_ * call_.value.head_dim));
  const int64_t runs = (tokens + kStagedTokens - 1) / kStagedTokens;
  Scratch<Place> refused;
  NSQ_TRY(refused.allocate(batch * runs));
  NSQ_TRY(parallel(call_.threads, batch * runs, [&](int64_t task) {
    const int64_t row = task / runs, first = task % runs * kStagedTokens;
    refused[task].name = nullptr;
    return stage_tokens(row, first, std::min(first + kStagedTokens, rows_[row].added),
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

bool Attention::stage_tokens(int64_t row, int64_t first, int64_t last, Place* refused) {
  if (first >= last) return true;
  const int64_t head_dim = call_.key.head_dim, value_dim = call_.value.head_dim;
  const int64_t heads = call_.options.heads, half = call_.rotary_half;
  const int64_t most = std::max(heads * head_dim, kv_heads_ * value_dim);
  Scratch<float> room;
  Scratch<uint16_t> narrowed;
  if (!room.allocate(most + head_dim + 2 * half).ok() || !narrowed.allocate(head_dim).ok()) {
    return false;
  }
  float* turned = room.data() + most;
  const float *cos = nullptr, *sin = nullptr;
  const auto rotated = [&](const float* x) -> const float* {
    if (cos == nullptr) return x;
    rotate(x, cos, sin, half, call_.options.rotary_interleaved, head_dim, turned);
    if (call_.dtype == Dtype::float32) return turned;
    kernels_.narrow(turned, call_.dtype, head_dim, narrowed.data());
    kernels_.widen(narrowed.data(), call_.dtype, head_dim, turned);
    return turned;
  };
  // All heads of one token; out_of(head) is where a head goes.
  const auto stage = [&](const char* name, const void* token, int64_t i, int64_t count,
                         int64_t channels, bool rotates, double factor, const auto& out_of) {
    const float* x = widened(token, count * channels, room.data());
    for (int64_t head = 0; head < count; ++head, x += channels) {
      const float* from = rotates ? rotated(x) : x;
      float* out = out_of(head);
      for (int64_t j = 0; j < channels; ++j) out[j] = static_cast<float>(from[j] * factor);
      const int64_t channel = first_not_finite(out, channels);
      if (channel == channels || refused->name != nullptr) continue;
      *refused = {name, row, i, head, channel};
    }
  };
  const double scale = call_.options.scale != 0 ? call_.options.scale
                                                : 1 / std::sqrt(static_cast<double>(head_dim));
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = row * call_.tokens + i;
    if (call_.cos != nullptr) {
      const int64_t position =
          call_.position_ids != nullptr ? call_.position_ids[token] : rows_[row].past + i;
      float* angles = turned + head_dim;
      cos = widened(at(call_.cos, position * half, call_.dtype), half, angles);
      sin = widened(at(call_.sin, position * half, call_.dtype), half, angles + half);
    }
    stage("query", at(call_.query, token * call_.query_stride, call_.dtype), i, heads, head_dim,
          true, scale, [&](int64_t head) {
            const int64_t kv_head = row * kv_heads_ + head / group_;
            const int64_t line = (kv_head * call_.tokens + i) * group_ + head % group_;
            return staged_.query.data() + line * head_dim;
          });
    for (const Side* side : {&call_.key, &call_.value}) {
      const bool is_key = side == &call_.key;
      float* out = is_key ? staged_.key.data() : staged_.value.data();
      stage(side->name, at(side->tokens, token * side->stride, call_.dtype), i, kv_heads_,
            side->head_dim, is_key, 1, [&](int64_t head) {
              return out + ((row * kv_heads_ + head) * call_.tokens + i) * side->head_dim;
            });
    }
  }
  return true;
}

// --- the cache -----------------------------------------------------------------------------------

bool in_place(const Parts& past, const Parts& present) {
  return past.packed == present.packed && past.scale == present.scale &&
         past.norm == present.norm && past.zero == present.zero && past.sinks == present.sinks &&
         past.tail == present.tail;
}

Status Attention::copy_past() {
  if (in_place(call_.key.past, call_.key.present) &&
      in_place(call_.value.past, call_.value.present)) {
    return Status();
  }
  return parallel(call_.threads, call_.batch * kv_heads_, [&](int64_t task) {
    copy_head(call_.key, task / kv_heads_, task);
    copy_head(call_.value, task / kv_heads_, task);
    return true;
  });
}

// The bytes of one head in a part that is not the past's memory: those before `kept` are the past's,
// those from `used` on are 0, and what is between is written later.
void carry(const void* from, void* to, int64_t first, int64_t kept, int64_t used, int64_t end) {
  if (from == to) return;
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  if (kept > first) {
    std::memcpy(target + first, source + first, static_cast<size_t>(kept - first));
  }
  if (end > used) std::memset(target + used, 0, static_cast<size_t>(end - used));
}

// `head` counts through rows and heads. What is behind the length is cleared, not copied: in the
// past's memory too it may be of another request.
void Attention::copy_head(const Side& side, int64_t row, int64_t head) const {
  const Scheme& scheme = side.scheme;
  const Cut past = cut(scheme, rows_[row].past), now = cut(scheme, rows_[row].length);
  const Places first = places(side, head, 0), kept = places(side, head, past.sealed);
  const Places used = places(side, head, now.sealed), end = places(side, head + 1, 0);
  const Parts &a = side.past, &b = side.present;
  const auto sealed = [&](const void* from, void* to, int64_t Places::*at, int64_t size) {
    carry(from, to, first.*at * size, kept.*at * size, used.*at * size, end.*at * size);
  };
  sealed(a.packed, b.packed, &Places::packed, 1);
  sealed(a.scale, b.scale, &Places::scale, size_of(scheme.scale_dtype));
  sealed(a.zero, b.zero, &Places::scale, size_of(scheme.scale_dtype));
  sealed(a.norm, b.norm, &Places::norm, size_of(scheme.norm_dtype));
  const auto plain = [&](const void* from, void* to, int64_t Places::*at, int64_t old,
                         int64_t all) {
    const int64_t size = size_of(call_.dtype), token = side.head_dim * size;
    const int64_t start = first.*at * size;
    carry(from, to, start, start + old * token, start + all * token, end.*at * size);
  };
  plain(a.sinks, b.sinks, &Places::sinks, past.sinks, now.sinks);
  // A tail that is sealed is read where it was.
  plain(a.tail, b.tail, &Places::tail, now.sealed == past.sealed ? past.tail : 0, now.tail);
}

// Whether a refusal is about a scale of a channel, and `token` its number.
bool is_channel(const Side& side, const Refusal& refusal) {
  return !side.scheme.per_token && std::strcmp(refusal.rule, "S5") == 0;
}

Status Attention::seal() {
  // One task a block of a head of a row, those of the longest append in all.
  int64_t blocks[2] = {0, 0};
  const Side* sides[2] = {&call_.key, &call_.value};
  for (int s = 0; s < 2; ++s) {
    const Scheme& scheme = sides[s]->scheme;
    for (int64_t b = 0; b < call_.batch; ++b) {
      const Row& row = rows_[b];
      const int64_t more = cut(scheme, row.length).sealed - cut(scheme, row.past).sealed;
      blocks[s] = std::max(blocks[s], more / scheme.block_size);
    }
  }
  const int64_t heads = call_.batch * kv_heads_, key_tasks = blocks[0] * heads;
  const int64_t tasks = key_tasks + blocks[1] * heads;
  if (tasks == 0) return Status();
  Scratch<Refusal> refusals;
  NSQ_TRY(refusals.allocate(tasks));
  const auto side_of = [&](int64_t task) { return task < key_tasks ? 0 : 1; };
  const auto head_of = [&](int64_t task) {
    return (task < key_tasks ? task : task - key_tasks) / blocks[side_of(task)];
  };
  NSQ_TRY(parallel(call_.threads, tasks, [&](int64_t task) {
    const int s = side_of(task);
    const int64_t head = head_of(task), number = (task - s * key_tasks) % blocks[s];
    refusals[task] = Refusal();
    return seal_block(*sides[s], head / kv_heads_, head, number, &refusals[task]);
  }));
  for (int64_t task = 0; task < tasks; ++task) {
    const Refusal& refusal = refusals[task];
    if (refusal.rule == nullptr) continue;
    return Status::error("%s cannot be sealed at row %lld, head %lld, %s %lld: %s (rule %s)",
                         sides[side_of(task)]->name, shown(head_of(task) / kv_heads_),
                         shown(head_of(task) % kv_heads_),
                         is_channel(*sides[side_of(task)], refusal) ? "channel" : "position",
                         shown(refusal.token), refusal.reason, refusal.rule);
  }
  return Status();
}

bool Attention::seal_block(const Side& side, int64_t row, int64_t head, int64_t number,
                           Refusal* refusal) {
  const Scheme& scheme = side.scheme;
  const int64_t past = rows_[row].past, tokens = scheme.block_size, head_dim = side.head_dim;
  const int64_t sealed = cut(scheme, past).sealed + number * tokens;
  if (sealed >= cut(scheme, rows_[row].length).sealed) return true;
  const int64_t first = scheme.sink_tokens + sealed;  // its position
  const float* fresh = staged(side) + head * call_.tokens * head_dim;
  const int64_t waiting = std::max<int64_t>(past - first, 0);  // of the block, in the tail
  const int64_t scales = scheme.per_token ? tokens : head_dim;
  Scratch<float> room;
  if (!room.allocate(2 * scales + tokens + (waiting > 0 ? tokens * head_dim : 0)).ok()) {
    return false;
  }
  const float* x = fresh + (first - past) * head_dim;
  const Places to = places(side, head, sealed);
  Block block = {};
  block.packed = side.present.packed + to.packed;
  block.scale = room.data();
  if (side.present.zero != nullptr) block.zero = block.scale + scales;
  if (side.present.norm != nullptr) block.norm = block.scale + 2 * scales;
  if (waiting > 0) {
    float* joined = block.scale + 2 * scales + tokens;
    kernels_.widen(at(side.past.tail, to.tail, call_.dtype), call_.dtype, waiting * head_dim,
                   joined);
    std::copy(fresh, fresh + (tokens - waiting) * head_dim, joined + waiting * head_dim);
    x = joined;
  }
  *refusal = kernels_.encode_block(scheme, x, tokens, head_dim, block);
  if (refusal->rule != nullptr) {
    if (std::strcmp(refusal->rule, "memory") == 0) return false;
    if (!is_channel(side, *refusal)) refusal->token += first;
    return true;
  }
  const auto narrow = [&](const float* from, void* part, int64_t place, int64_t count,
                          Dtype dtype) {
    if (part != nullptr) kernels_.narrow(from, dtype, count, at(part, place, dtype));
  };
  narrow(block.scale, side.present.scale, to.scale, scales, scheme.scale_dtype);
  narrow(block.zero, side.present.zero, to.scale, scales, scheme.scale_dtype);
  narrow(block.norm, side.present.norm, to.norm, tokens, scheme.norm_dtype);
  return true;
}

void Attention::write_tails() const {
  for (int64_t head = 0; head < call_.batch * kv_heads_; ++head) {
    write_tail(call_.key, head / kv_heads_, head);
    write_tail(call_.value, head / kv_heads_, head);
  }
  for (int64_t b = 0; b < call_.batch; ++b) call_.present_lengths[b] = rows_[b].length;
}

void Attention::write_tail(const Side& side, int64_t row, int64_t head) const {
  const Row& lengths = rows_[row];
  const Cut now = cut(side.scheme, lengths.length);
  const Places to = places(side, head, 0);
  const float* fresh = staged(side) + head * call_.tokens * side.head_dim;
  const auto write = [&](int64_t first, int64_t last, void* part, int64_t place, int64_t start) {
    if (first >= last) return;
    kernels_.narrow(fresh + (first - lengths.past) * side.head_dim, call_.dtype,
                    (last - first) * side.head_dim,
                    at(part, place + (first - start) * side.head_dim, call_.dtype));
  };
  write(lengths.past, now.sinks, side.present.sinks, to.sinks, 0);
  write(std::max(lengths.past, now.tail_start()), lengths.length, side.present.tail, to.tail,
        now.tail_start());
}

// --- reading -------------------------------------------------------------------------------------

// The keys, or the values, of one key/value head of a row, sealed but not yet written to the tail.
struct Attention::Tokens {
  const Side* side;
  Cut now;
  int64_t past;
  int64_t head;        // through rows and heads
  const float* fresh;  // of position `past` and on
};

// Tokens that lie together: floats, or of one block.
struct Attention::Piece {
  int64_t tokens;
  const float* floats;  // null if it is of a block
  Block block;
};

// What a task needs; all are parts of one allocation.
struct Attention::Workspace {
  Scratch<float> memory;
  float* scores;   // [pass rows, kStride]
  float* factors;  // [pass rows]: what earlier weights must be multiplied with
  float* sums;     // [pass rows, value_dim]: the output of one tile of tokens
  float* scale;    // of one block
  float* zero;
  float* norm;
  float* bias;    // [kTile]
  float* stored;  // [kTile, head_dim or value_dim]: widened tokens of the tail
  float* keys;    // [kTile, head_dim], where they are decoded
  float* values;
  float* partial;  // what `Plan::partial_at` takes, unless segments have theirs
};

Attention::Tokens Attention::tokens_of(const Side& side, int64_t row, int64_t head) const {
  return {&side, cut(side.scheme, rows_[row].length), rows_[row].past, head,
          staged(side) + head * call_.tokens * side.head_dim};
}

// The tokens from position `first` on, at least one and none from `last` on.
Attention::Piece Attention::piece_at(const Tokens& tokens, int64_t first, int64_t last,
                                     Workspace& space) const {
  const Side& side = *tokens.side;
  const Scheme& scheme = side.scheme;
  const int64_t sinks = tokens.now.sinks, tail = tokens.now.tail_start();
  if (first < sinks || first >= tail) {
    if (first < sinks) last = std::min(last, sinks);
    if (first >= tokens.past) {
      return {last - first, tokens.fresh + (first - tokens.past) * side.head_dim, {}};
    }
    last = std::min(last, tokens.past);
    const Places from = places(side, tokens.head, 0);
    const int64_t place = first < sinks ? from.sinks + first * side.head_dim
                                        : from.tail + (first - tail) * side.head_dim;
    const void* part = first < sinks ? side.present.sinks : side.present.tail;
    return {last - first,
            widened(at(part, place, call_.dtype), (last - first) * side.head_dim, space.stored),
            {}};
  }
  const int64_t sealed = first - sinks;
  const int64_t block_end = (sealed / scheme.block_size + 1) * scheme.block_size;
  const int64_t count = std::min(last - sinks, block_end) - sealed;
  const int64_t scales = scheme.per_token ? count : side.head_dim;
  const Places from = places(side, tokens.head, sealed);
  Block block = {};
  block.packed = side.present.packed + from.packed;
  const auto widen = [&](const void* part, int64_t place, int64_t number, Dtype dtype,
                         float* room) -> float* {
    if (part == nullptr) return nullptr;
    kernels_.widen(at(part, place, dtype), dtype, number, room);
    const auto* next = at(part, place + number, dtype);
    for (int64_t i = 0; i < number * size_of(dtype); i += 64) __builtin_prefetch(next + i);
    return room;
  };
  block.scale = widen(side.present.scale, from.scale, scales, scheme.scale_dtype, space.scale);
  block.zero = widen(side.present.zero, from.scale, scales, scheme.scale_dtype, space.zero);
  block.norm = widen(side.present.norm, from.norm, count, scheme.norm_dtype, space.norm);
  return {count, nullptr, block};
}

void Attention::load(const Tokens& tokens, int64_t first, int64_t last, Workspace& space,
                     float* out) const {
  const int64_t head_dim = tokens.side->head_dim;
  while (first < last) {
    const Piece piece = piece_at(tokens, first, last, space);
    if (piece.floats != nullptr) {
      std::copy(piece.floats, piece.floats + piece.tokens * head_dim, out);
    } else {
      kernels_.decode_block(tokens.side->scheme, piece.block, piece.tokens, head_dim, out);
    }
    first += piece.tokens;
    out += piece.tokens * head_dim;
  }
}

// --- attention -----------------------------------------------------------------------------------

// How the work is cut, by sizes alone. A task is for some queries of the heads that share a
// key/value head, and for a segment of the tokens.
struct Attention::Plan {
  bool decode_keys, decode_values;  // or codes are read
  int64_t task_queries;             // query tokens of a task
  int64_t pass_queries;             // of them, those whose scores are held at a time
  int64_t tiles;                    // tasks of a row and head, by queries
  int64_t segments;                 // and by tokens
  int64_t segment_tokens;

  int64_t task_rows, pass_rows;  // the same for all heads that share keys
  int64_t partial_size;          // floats of sums over a segment

  Partial partial_at(float* memory) const;
};

// Query tokens of one row, for all query heads that share one key/value head.
struct Attention::Queries {
  int64_t row, head;     // `head` counts through rows and key/value heads
  int64_t first, count;  // query tokens
  int64_t position;      // of the first
  const float* rows;     // [count, group, head_dim]
};

// Sums over some of the tokens, for all rows of some queries.
struct Attention::Partial {
  float* most;    // [rows], the maximum that exponentials are taken from; -infinity: none is seen
  float* total;   // [rows], the sum of exponentials
  float* output;  // [rows, value_dim]
  Roundings* roundings;  // [rows]
};

Attention::Partial Attention::Plan::partial_at(float* memory) const {
  float* output = memory + 2 * task_rows;
  return {memory, memory + task_rows, output,
          reinterpret_cast<Roundings*>(output + partial_size - 4 * task_rows)};
}

Attention::Plan Attention::plan() const {
  const AttentionOptions& options = call_.options;
  const int64_t rows = call_.tokens * group_;
  const bool exact = call_.exact || (rows > kManyRows && call_.tokens > 1);
  Plan plan = {};
  plan.decode_keys = exact || !kernels_.reads_codes(call_.key.scheme, call_.key.head_dim);
  plan.decode_values = exact || !kernels_.reads_codes(call_.value.scheme, call_.value.head_dim);
  const int64_t heads = call_.batch * kv_heads_;
  // Few tasks leave threads idle: then a block is decoded for fewer rows.
  const int64_t most_rows = heads * (rows / kTaskRows) >= kTasks ? kTaskRows : kTaskRows / 4;
  plan.task_queries = std::min(std::max<int64_t>(1, most_rows / group_), call_.tokens);
  plan.pass_queries = std::min(std::max<int64_t>(1, kPassRows / group_), plan.task_queries);
  plan.tiles = (call_.tokens + plan.task_queries - 1) / plan.task_queries;
  int64_t longest = 0;
  for (int64_t b = 0; b < call_.batch; ++b) longest = std::max(longest, rows_[b].length);
  if (options.sliding_window > 0 && options.sliding_window < longest) {
    longest = std::min(longest, options.sliding_window + plan.task_queries - 1);
  }
  const int64_t wanted = (kTasks + heads * plan.tiles - 1) / (heads * plan.tiles);
  plan.segments = std::max<int64_t>(1, std::min(wanted, (longest + kSegment - 1) / kSegment));
  plan.segment_tokens = round_up((longest + plan.segments - 1) / plan.segments, kTile);
  plan.task_rows = plan.task_queries * group_;
  plan.pass_rows = plan.pass_queries * group_;
  plan.partial_size = plan.task_rows * (call_.value.head_dim + 4);
  return plan;
}

bool Attention::allocate(const Plan& plan, Workspace* space) const {
  const int64_t head_dim = call_.key.head_dim, value_dim = call_.value.head_dim;
  const int64_t wide = std::max(head_dim, value_dim), scales = std::max(wide, kTile);
  struct {
    float** part;
    int64_t size;
  } const parts[] = {
      {&space->scores, plan.pass_rows * kStride},
      {&space->factors, plan.pass_rows},
      {&space->sums, plan.pass_rows * value_dim},
      {&space->scale, scales},
      {&space->zero, scales},
      {&space->norm, kTile},
      {&space->bias, kTile},
      {&space->stored, call_.dtype == Dtype::float32 ? 0 : kTile * wide},
      {&space->keys, plan.decode_keys ? kTile * head_dim : 0},
      {&space->values, plan.decode_values ? kTile * value_dim : 0},
      {&space->partial, plan.segments > 1 ? 0 : plan.partial_size},
  };
  int64_t all = 0;
  for (const auto& one : parts) all += round_up(one.size, 16);
  if (!space->memory.allocate(all).ok()) return false;
  float* next = space->memory.data();
  for (const auto& one : parts) {
    *one.part = next;
    next += round_up(one.size, 16);
  }
  return true;
}

Attention::Queries Attention::queries_of(const Plan& plan, int64_t tile) const {
  const int64_t heads = call_.batch * kv_heads_, head = tile % heads, row = head / kv_heads_;
  // The last queries see the most tokens: begin with them, so that nobody waits for them at last.
  const int64_t first = (plan.tiles - 1 - tile / heads) * plan.task_queries;
  return {row, head, first, std::min(plan.task_queries, rows_[row].added - first),
          rows_[row].past + first,
          staged_.query.data() + (head * call_.tokens + first) * group_ * call_.key.head_dim};
}

// A position at or below this one where a block of the keys begins, unless blocks are long.
int64_t block_start(const Scheme& scheme, int64_t position) {
  if (scheme.block_size > kTile || position <= scheme.sink_tokens) return position;
  return position - (position - scheme.sink_tokens) % scheme.block_size;
}

Status Attention::attend() {
  const Plan plan = this->plan();
  const int64_t tiles = call_.batch * kv_heads_ * plan.tiles;
  Scratch<float> partials;
  if (plan.segments > 1) NSQ_TRY(partials.allocate(tiles * plan.segments, plan.partial_size));
  clear_padding();
  NSQ_TRY(parallel(call_.threads, tiles * plan.segments, [&](int64_t task) {
    const Queries queries = queries_of(plan, task / plan.segments);
    if (queries.count <= 0) return true;
    Workspace space;
    if (!allocate(plan, &space)) return false;
    const Partial result = plan.partial_at(
        plan.segments > 1 ? partials.data() + task * plan.partial_size : space.partial);
    attend_segment(queries, task % plan.segments, plan, space, result);
    if (plan.segments == 1) finish(queries, result);
    return true;
  }));
  if (plan.segments == 1) return Status();
  return parallel(call_.threads, tiles, [&](int64_t tile) {
    const Queries queries = queries_of(plan, tile);
    if (queries.count <= 0) return true;
    float* memory = partials.data() + tile * plan.segments * plan.partial_size;
    const Partial result = plan.partial_at(memory);
    for (int64_t segment = 1; segment < plan.segments; ++segment) {
      merge(queries, plan.partial_at(memory + segment * plan.partial_size), result);
    }
    finish(queries, result);
    return true;
  });
}

void Attention::clear_padding() const {
  const int64_t channels = call_.options.heads * call_.value.head_dim;
  for (int64_t b = 0; b < call_.batch; ++b) {
    const int64_t added = rows_[b].added;
    std::memset(at(call_.output, (b * call_.tokens + added) * channels, call_.dtype), 0,
                static_cast<size_t>((call_.tokens - added) * channels * size_of(call_.dtype)));
  }
}

void Attention::attend_segment(const Queries& queries, int64_t segment, const Plan& plan,
                               Workspace& space, const Partial& result) const {
  const int64_t rows = queries.count * group_;
  std::fill(result.most, result.most + rows, -kInfinity);
  std::fill(result.total, result.total + rows, 0.0f);
  std::fill(result.roundings, result.roundings + rows, Roundings());
  std::fill(result.output, result.output + rows * call_.value.head_dim, 0.0f);
  const int64_t low = first_seen(queries.position);
  const int64_t high =
      call_.options.causal ? queries.position + queries.count : rows_[queries.row].length;
  const auto edge = [&](int64_t number) {
    if (number == 0 || number == plan.segments) return number == 0 ? low : high;
    const int64_t position = block_start(call_.key.scheme, low + number * plan.segment_tokens);
    return std::min(std::max(position, low), high);
  };
  const int64_t start = edge(segment), end = edge(segment + 1);
  const Tokens keys = tokens_of(call_.key, queries.row, queries.head);
  const Tokens values = tokens_of(call_.value, queries.row, queries.head);
  for (int64_t first = start, last; first < end; first = last) {
    const int64_t whole = block_start(call_.key.scheme, first + kTile);
    last = std::min(whole > first ? whole : first + kTile, end);
    if (plan.decode_keys) load(keys, first, last, space, space.keys);
    if (plan.decode_values) load(values, first, last, space, space.values);
    for (int64_t i = 0; i < queries.count; i += plan.pass_queries) {
      Queries pass = queries;
      pass.first += i;
      pass.count = std::min(plan.pass_queries, queries.count - i);
      pass.position += i;
      pass.rows += i * group_ * call_.key.head_dim;
      const int64_t from = std::max(first, first_seen(pass.position));
      const int64_t to = call_.options.causal ? std::min(last, pass.position + pass.count) : last;
      if (from >= to) continue;
      const int64_t r = i * group_;
      const Partial part = {result.most + r, result.total + r,
                            result.output + r * call_.value.head_dim, result.roundings + r};
      score(pass, keys, from, to, plan.decode_keys ? from - first : -1, space);
      weigh(pass, from, to, space, part);
      add(pass, values, from, to, plan.decode_values ? from - first : -1, space, part);
    }
  }
}

// Scores of tokens [low, high), which begin at `decoded` of those that are decoded, or are not.
void Attention::score(const Queries& queries, const Tokens& keys, int64_t low, int64_t high,
                      int64_t decoded, Workspace& space) const {
  const int64_t head_dim = call_.key.head_dim, rows = queries.count * group_;
  if (decoded >= 0) {
    kernels_.score_floats(space.keys + decoded * head_dim, high - low, head_dim, queries.rows,
                          rows, space.scores, kStride);
    return;
  }
  for (int64_t first = low; first < high;) {
    const Piece piece = piece_at(keys, first, high, space);
    float* scores = space.scores + (first - low);
    if (piece.floats != nullptr) {
      kernels_.score_floats(piece.floats, piece.tokens, head_dim, queries.rows, rows, scores,
                            kStride);
    } else {
      kernels_.score_codes(call_.key.scheme, piece.block, piece.tokens, head_dim, queries.rows,
                           rows, scores, kStride);
    }
    first += piece.tokens;
  }
}

// Turns scores of tokens [low, high) into weights relative to each row's maximum so far.
void Attention::weigh(const Queries& queries, int64_t low, int64_t high, Workspace& space,
                      const Partial& result) const {
  const AttentionOptions& options = call_.options;
  for (int64_t r = 0; r < queries.count * group_; ++r) {
    const int64_t position = queries.position + r / group_;
    const int64_t from = std::max(low, first_seen(position));
    const int64_t to = options.causal ? std::min(high, position + 1) : high;
    float* scores = space.scores + r * kStride;
    const float most = result.most[r];
    float new_most = most;
    if (from < to) {
      float* seen = scores + (from - low);
      if (options.softcap > 0) kernels_.cap(seen, to - from, options.softcap);
      if (call_.bias != nullptr) add_bias(queries, r, from, to, space, seen);
      new_most = std::max(most, kernels_.largest(seen, to - from));
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
                      kernels_.exponentials(scores + (from - low), to - from, new_most);
    result.most[r] = new_most;
    space.factors[r] = factor;
  }
}

void Attention::add_bias(const Queries& queries, int64_t r, int64_t low, int64_t high,
                         Workspace& space, float* scores) const {
  const int64_t head = queries.head % kv_heads_ * group_ + r % group_;
  const int64_t row = call_.bias_batch > 1 ? queries.row : 0;
  const int64_t line = (row * call_.bias_heads + (call_.bias_heads > 1 ? head : 0)) *
                           call_.tokens + queries.first + r / group_;
  const float* bias = widened(at(call_.bias, line * call_.bias_tokens + low, call_.dtype),
                              high - low, space.bias);
  int spoilt = 0;
  for (int64_t t = 0; t < high - low; ++t) {
    scores[t] += bias[t];
    spoilt |= bias[t] < kInfinity ? 0 : 1;  // nor is NaN
  }
  if (spoilt != 0) bias_spoils_ = true;
}

// Adds the values of tokens [low, high) times their weights to the result.
void Attention::add(const Queries& queries, const Tokens& values, int64_t low, int64_t high,
                    int64_t decoded, Workspace& space, const Partial& result) const {
  const int64_t value_dim = call_.value.head_dim, rows = queries.count * group_;
  std::fill(space.sums, space.sums + rows * value_dim, 0.0f);
  if (decoded >= 0) {
    kernels_.add_floats(space.values + decoded * value_dim, high - low, value_dim, space.scores,
                        kStride, rows, space.sums);
  }
  for (int64_t r = 0; r < rows; ++r) result.roundings[r].rescale(space.factors[r]);
  for (int64_t first = low; decoded < 0 && first < high;) {
    const Piece piece = piece_at(values, first, high, space);
    const float* weights = space.scores + (first - low);
    if (piece.floats != nullptr) {
      kernels_.add_floats(piece.floats, piece.tokens, value_dim, weights, kStride, rows,
                          space.sums);
    } else {
      kernels_.add_codes(call_.value.scheme, piece.block, piece.tokens, value_dim, weights,
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

// Adds sums over other tokens to the result.
void Attention::merge(const Queries& queries, const Partial& other, const Partial& result) const {
  const int64_t value_dim = call_.value.head_dim;
  for (int64_t r = 0; r < queries.count * group_; ++r) {
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
void Attention::finish(const Queries& queries, const Partial& result) const {
  const AttentionOptions& options = call_.options;
  const int64_t value_dim = call_.value.head_dim;
  for (int64_t r = 0; r < queries.count * group_; ++r) {
    const int64_t head = queries.head % kv_heads_ * group_ + r % group_;
    const int64_t token = queries.row * call_.tokens + queries.first + r / group_;
    float sink = options.smooth_softmax ? 0 : -kInfinity, room;
    if (call_.head_sink != nullptr) {
      sink = *widened(at(call_.head_sink, head, call_.dtype), 1, &room);
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
    kernels_.narrow(out, call_.dtype, value_dim,
                    at(call_.output, (token * options.heads + head) * value_dim, call_.dtype));
  }
}

}  // namespace

Status attend(const AttentionCall& call) { return Attention(call).run(); }

}  // namespace nsq
