// One call of an operator: its inputs, outputs and threads.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "runtime/memory.h"
#include "runtime/operator.h"
#include "runtime/threads.h"

namespace nsq {

class Context {
 public:
  Context(const OrtApi& api, OrtKernelContext& context, const Operator& definition)
      : api_(api), context_(context), definition_(definition) {}

  Status input(int index, Tensor* tensor) const;
  // Allocates the output; it is not present if the model does not use it.
  Status output(int index, const int64_t* dims, int rank, Tensor* tensor);
  Status output(int index, std::initializer_list<int64_t> dims, Tensor* tensor) {
    return output(index, dims.begin(), static_cast<int>(dims.size()), tensor);
  }
  Threads threads() const { return Threads(api_, context_); }

 private:
  Status describe(OrtValue* value, Tensor* tensor) const;
  Status answer(OrtStatus* status) const { return Status::of(api_, status); }

  const OrtApi& api_;
  OrtKernelContext& context_;
  const Operator& definition_;
};

}  // namespace nsq
