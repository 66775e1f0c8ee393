// Work on the threads of a session.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/ort_abi.h"
#include "runtime/status.h"

namespace nsq {

// While it lives, its thread's arithmetic is that of the specification: subnormals are numbers like
// others, roundings go to even, and nothing traps. Threads of a session may be in another mode
// (session.set_denormal_as_zero), which comes back after it.
class IeeeArithmetic {
 public:
  IeeeArithmetic();
  ~IeeeArithmetic();
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  uint64_t before_ = 0;  // the processor's control register
};

// Those of one call.
class Threads {
 public:
  Threads(const OrtApi& api, const OrtKernelContext& context) : api_(api), context_(context) {}

  // Calls function(task) for every task below `tasks`, in any order.
  template <typename Function>
  Status parallel_for(int64_t tasks, const Function& function) const {
    if (tasks <= 1) {
      if (tasks == 1) function(int64_t{0});
      return Status();
    }
    auto call = [](void* data, size_t task) {
      const IeeeArithmetic arithmetic;  // of a thread that may be another
      (*static_cast<const Function*>(data))(static_cast<int64_t>(task));
    };
    return Status::of(api_, api_.KernelContext_ParallelFor(&context_, call,
                                                           static_cast<size_t>(tasks), 0,
                                                           const_cast<Function*>(&function)));
  }

 private:
  const OrtApi& api_;
  const OrtKernelContext& context_;
};

}  // namespace nsq
