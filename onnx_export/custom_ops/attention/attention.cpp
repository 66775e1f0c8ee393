// The steps of a call, and what its lengths, positions and biases may be.
#include <limits>

#include "attention/buffer.h"
#include "attention/work.h"

namespace nsq {
namespace {

int64_t most_tokens(const Side& side) {
  return side.scheme.sink_tokens + side.capacity + side.scheme.block_size - 1;
}

Status check_positions(const Work& work, int64_t row) {
  const AttentionCall& call = work.call;
  const int64_t added = work.rows[row].added, length = work.rows[row].length;
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

// What the buffers of a row say of themselves: one number in all of them, at least the past's.
Status read_stored(Work& work, int64_t row) {
  const AttentionCall& call = work.call;
  if (call.key.header == nullptr) return Status();
  Row& lengths = work.rows[row];
  int64_t stored = -1;
  for (const Side* side : {&call.key, &call.value}) {
    const int64_t most = most_tokens(*side);
    for (int64_t i = 0; i < work.kv_heads; ++i) {
      const int64_t head = row * work.kv_heads + i;
      const Header& header = *header_of(side->past_header, side->buffer_bytes, head);
      const bool empty = header.mark == 0 && header.length == 0;
      if ((!empty && header.mark != Header::kMark) || header.length < 0 || header.length > most) {
        return Status::error("past_%s is no cache of this node at row %lld, head %lld; begin with "
                             "zeros", side->name, shown(row), shown(i));
      }
      if (stored >= 0 && header.length != stored) {
        return Status::error("past_%s has %lld tokens at row %lld, head %lld, and the head before "
                             "it %lld; give all of one cache", side->name, shown(header.length),
                             shown(row), shown(i), shown(stored));
      }
      stored = header.length;
    }
  }
  if (lengths.past > stored) {
    return Status::error("past_lengths[%lld] is %lld; past_key and past_value have %lld tokens",
                         shown(row), shown(lengths.past), shown(stored));
  }
  lengths.stored = stored;
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
      const int64_t most = most_tokens(*side);
      const char* parts = side->header == nullptr ? "_packed and the other parts hold" : " holds";
      if (past < 0 || past > most) {
        return Status::error("past_lengths[%lld] is %lld; past_%s%s 0 to %lld tokens", shown(b),
                             shown(past), side->name, parts, shown(most));
      }
      if (added > most - past) {
        return Status::error(
            "past_lengths[%lld] is %lld, and %lld tokens more are beyond the %lld that past_%s%s; "
            "give the cache a larger capacity", shown(b), shown(past), shown(added), shown(most),
            side->name, parts);
      }
    }
    work.rows[b] = {past, added, past + added, past};
    NSQ_TRY(read_stored(work, b));
    if (call.bias != nullptr && added > 0 && call.bias_tokens < past + added) {
      return Status::error("attention_bias is for %lld tokens, but row %lld has %lld after the "
                           "append", shown(call.bias_tokens), shown(b), shown(past + added));
    }
    if (call.cos != nullptr) NSQ_TRY(check_positions(work, b));
  }
  return Status();
}

// What keys are sealed with is looked at only if there are some to seal.
Status check_feedback(const Work& work) {
  const Scheme& scheme = work.call.key.scheme;
  for (int64_t b = 0; b < work.call.batch; ++b) {
    const Row& row = work.rows[b];
    if (cut(scheme, row.length).sealed > cut(scheme, row.past).sealed) {
      return work.call.key_feedback.check();
    }
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

Status attend(const AttentionCall& given) {
  AttentionCall call = given;
  Work work(call);
  NSQ_TRY(read_lengths(work));
  NSQ_TRY(check_feedback(work));
  NSQ_TRY(stage(work));
  NSQ_TRY(copy_past(work));
  for (Side* side : {&call.key, &call.value}) {
    if (side->header != nullptr) side->past = side->present;
  }
  NSQ_TRY(take_back(work));
  NSQ_TRY(seal(work));
  NSQ_TRY(attend(work));
  NSQ_TRY(check_bias(work));
  write_tails(work);
  return Status();
}

}  // namespace nsq
