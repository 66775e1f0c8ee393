#include "runtime/context.h"

namespace nsq {

Status Context::describe(OrtValue* value, Tensor* tensor) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  NSQ_TRY(answer(api_.GetTensorTypeAndShape(value, &info)));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api_, info};
  int element_type = 0;
  size_t rank = 0;
  NSQ_TRY(answer(api_.GetTensorElementType(info, &element_type)));
  NSQ_TRY(answer(api_.GetDimensionsCount(info, &rank)));
  if (rank > Tensor::max_rank) {
    return Status::error("%s has %zu axes; at most %d are supported", tensor->name, rank,
                         Tensor::max_rank);
  }
  NSQ_TRY(answer(api_.GetDimensions(info, tensor->dims, rank)));
  NSQ_TRY(answer(api_.GetTensorMutableData(value, &tensor->data)));
  tensor->element = static_cast<Element>(element_type);
  tensor->rank = static_cast<int>(rank);
  tensor->present = true;
  tensor->bytes = tensor->element_count() * size_of(tensor->element);
  return Status();
}

Status Context::input(int index, Tensor* tensor) const {
  *tensor = Tensor();
  tensor->name = definition_.inputs[index].name;
  size_t count = 0;
  NSQ_TRY(answer(api_.KernelContext_GetInputCount(&context_, &count)));
  if (static_cast<size_t>(index) >= count) return Status();  // the node ends before it
  const OrtValue* value = nullptr;
  NSQ_TRY(answer(
      api_.KernelContext_GetInput(&context_, static_cast<size_t>(index), &value)));
  if (value == nullptr) return Status();
  return describe(const_cast<OrtValue*>(value), tensor);
}

Status Context::output(int index, const int64_t* dims, int rank, Tensor* tensor) {
  *tensor = Tensor();
  tensor->name = definition_.outputs[index].name;
  size_t count = 0;
  NSQ_TRY(answer(api_.KernelContext_GetOutputCount(&context_, &count)));
  if (static_cast<size_t>(index) >= count) return Status();
  OrtValue* value = nullptr;
  NSQ_TRY(answer(api_.KernelContext_GetOutput(&context_, static_cast<size_t>(index), dims,
                                                    static_cast<size_t>(rank), &value)));
  if (value == nullptr) return Status();
  return describe(value, tensor);
}

}  // namespace nsq
