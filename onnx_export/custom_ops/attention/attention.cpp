#include "attention/attention.h"

#include "attention/work.h"

namespace nsq {

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
