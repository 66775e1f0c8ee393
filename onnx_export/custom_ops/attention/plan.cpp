#include "attention/plan.h"

namespace nsq {
namespace {

// Query rows (of a token, one for each head that shares keys) that are worth decoding a block for.
constexpr int64_t kManyRows = 256;
constexpr int64_t kPassRows = 128;   // rows whose scores are held at a time
constexpr int64_t kTaskRows = 1024;  // rows for which a block is decoded once
// Enough tasks for many threads; their number must not depend on that of the threads.
constexpr int64_t kTasks = 64;
constexpr int64_t kSegment = 2048;  // tokens that are worth a task

int64_t divide_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit; }
int64_t round_up(int64_t number, int64_t unit) { return divide_up(number, unit) * unit; }

}  // namespace

Plan::Plan(const Work& work) {
  const AttentionCall& call = work.call;
  const int64_t group = work.group, rows = call.tokens * group;
  const bool exact = call.exact || (rows > kManyRows && call.tokens > 1);
  decode_keys = exact || !work.kernels.reads_codes(call.key.scheme, call.key.head_dim);
  decode_values = exact || !work.kernels.reads_codes(call.value.scheme, call.value.head_dim);
  const int64_t heads = call.batch * work.kv_heads;
  // Few tasks leave threads idle: then a block is decoded for fewer rows.
  const int64_t most_rows = heads * (rows / kTaskRows) >= kTasks ? kTaskRows : kTaskRows / 4;
  task_queries = std::min(std::max<int64_t>(1, most_rows / group), call.tokens);
  pass_queries = std::min(std::max<int64_t>(1, kPassRows / group), task_queries);
  tiles = divide_up(call.tokens, task_queries);
  int64_t longest = 0;
  for (int64_t b = 0; b < call.batch; ++b) longest = std::max(longest, work.rows[b].length);
  const int64_t window = call.options.sliding_window;
  if (window > 0 && window < longest) longest = std::min(longest, window + task_queries - 1);
  const int64_t wanted = divide_up(kTasks, heads * tiles);
  segments = std::max<int64_t>(1, std::min(wanted, divide_up(longest, kSegment)));
  segment_tokens = round_up(divide_up(longest, segments), kTile);
  task_rows = task_queries * group;
  pass_rows = pass_queries * group;
  partial_size = task_rows * (call.value.head_dim + 4);
}

Partial Plan::partial_at(float* memory) const {
  float* output = memory + 2 * task_rows;
  return {memory, memory + task_rows, output,
          reinterpret_cast<Roundings*>(output + partial_size - 4 * task_rows)};
}

Queries queries_of(const Work& work, const Plan& plan, int64_t tile) {
  const int64_t heads = work.call.batch * work.kv_heads;
  const int64_t head = tile % heads, row = head / work.kv_heads;
  // The last queries see the most tokens: begin with them, so that nobody waits for them at last.
  const int64_t first = (plan.tiles - 1 - tile / heads) * plan.task_queries;
  const int64_t line = (head * work.call.tokens + first) * work.group;
  return {row, head, first, std::min(plan.task_queries, work.rows[row].added - first),
          work.rows[row].past + first, work.query.data() + line * work.call.key.head_dim};
}

bool Workspace::allocate(const Work& work, const Plan& plan) {
  const int64_t head_dim = work.call.key.head_dim, value_dim = work.call.value.head_dim;
  const int64_t wide = std::max(head_dim, value_dim), scales = std::max(wide, kTile);
  struct {
    float** part;
    int64_t size;
  } const parts[] = {
      {&scores, plan.pass_rows * kStride},
      {&factors, plan.pass_rows},
      {&sums, plan.pass_rows * value_dim},
      {&room.scale, scales},
      {&room.zero, scales},
      {&room.norm, kTile},
      {&bias, kTile},
      {&room.stored, work.call.dtype == Dtype::float32 ? 0 : kTile * wide},
      {&keys, plan.decode_keys ? kTile * head_dim : 0},
      {&values, plan.decode_values ? kTile * value_dim : 0},
      {&partial, plan.segments > 1 ? 0 : plan.partial_size},
  };
  int64_t all = 0;
  for (const auto& one : parts) all += round_up(one.size, 16);
  if (!memory.allocate(all).ok()) return false;
  float* next = memory.data();
  for (const auto& one : parts) {
    *one.part = next;
    next += round_up(one.size, 16);
  }
  return true;
}

}  // namespace nsq
