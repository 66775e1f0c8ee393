// The steps of a call, and what its lengths, positions and biases may be.
#include <limits>

#include "attention/work.h"

namespace nsq {
namespace {

Status check_positions(const Work& work, int64_t row) {
  const AttentionCall& call = work.call;
  const auto [past, added, length] = work.rows[row];
  if (call.position_ids == nullptr) {
    if (added == 0 || length <= call.rotary_positions) return Status();
    return Status::error("cos has %lld positions, but row %lld needs position %lld",
                         shown(call.rotary_positions), shown(row), shown(length - 1));
  }
  for (int64_t i = 0; i < added; ++i) {
    const int64_t position = call.position_ids[row * call.tokens + i];
    if (position < 0 || position >= call.rotary_positions) {
      return Status::error("position_ids[%lld, %lld] is %lld; cos has %lld positions", shown(row),
                           shown(i), shown(position), shown(call.rotary_positions));
    }
  }
  return Status();
}

Status read_lengths(Work& work) {
  const AttentionCall& call = work.call;
  NSQ_TRY(work.rows.allocate(call.batch));
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t past = call.past_lengths[b];
    const int64_t added = call.new_lengths != nullptr ? call.new_lengths[b] : call.tokens;
    if (added < 0 || added > call.tokens) {
      return Status::error("new_lengths[%lld] is %lld; query has %lld tokens, so it lies between "
                           "0 and that", shown(b), shown(added), shown(call.tokens));
    }
    for (const Side* side : {&call.key, &call.value}) {
      const int64_t most =
          side->scheme.sink_tokens + side->capacity + side->scheme.block_size - 1;
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
    work.rows[b] = {past, added, past + added};
    if (call.bias != nullptr && added > 0 && call.bias_tokens < past + added) {
      return Status::error("attention_bias is for %lld tokens, but row %lld has %lld after the "
                           "append", shown(call.bias_tokens), shown(b), shown(past + added));
    }
    if (call.cos != nullptr) NSQ_TRY(check_positions(work, b));
  }
  return Status();
}

// What was seen of the bias was looked at when it was added: here only the place is found.
Status check_bias(const Work& work) {
  if (!work.bias_spoils) return Status();
  const AttentionCall& call = work.call;
  const int64_t queries = call.bias_batch * call.bias_heads * call.tokens;
  for (int64_t line = 0; line < queries; ++line) {
    const int64_t query = line % call.tokens, head = line / call.tokens % call.bias_heads;
    const int64_t row = line / call.tokens / call.bias_heads;
    for (int64_t b = row; b < (call.bias_batch > 1 ? row + 1 : call.batch); ++b) {
      const int64_t position = work.rows[b].past + query;
      const int64_t high = call.options.causal ? position + 1 : work.rows[b].length;
      for (int64_t t = work.first_seen(position); query < work.rows[b].added && t < high; ++t) {
        float room;
        const float bias =
            *work.widened(at(call.bias, line * call.bias_tokens + t, call.dtype), 1, &room);
        if (bias < std::numeric_limits<float>::infinity()) continue;
        return Status::error("attention_bias[%lld, %lld, %lld, %lld] is %g; a bias is finite, or "
                             "-infinity where a token is hidden", shown(row), shown(head),
                             shown(query), shown(t), static_cast<double>(bias));
      }
    }
  }
  return Status();
}

}  // namespace

Status attend(const AttentionCall& call) {
  Work work(call);
  NSQ_TRY(read_lengths(work));
  NSQ_TRY(stage(work));
  NSQ_TRY(copy_past(work));
  NSQ_TRY(seal(work));
  NSQ_TRY(attend(work));
  NSQ_TRY(check_bias(work));
  write_tails(work);
  return Status();
}

}  // namespace nsq
