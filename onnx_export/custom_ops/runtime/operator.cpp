// What onnxruntime calls, for the operator of any variant.
#include "runtime/operator.h"

#include <cstdio>
#include <cstdlib>

#include "runtime/context.h"

namespace nsq {
namespace {

// What a kernel's pointer points to; the operator's own object follows.
struct alignas(16) Instance {
  const OrtApi* api;
  const Operator* definition;
};

const Variant& variant_of(const OrtCustomOp* op) { return *reinterpret_cast<const Variant*>(op); }
const Operator& operator_of(const OrtCustomOp* op) { return *variant_of(op).definition; }

// The combination's number has a digit for each varying type.
int element_of(const Variant& variant, const Type& type) {
  if (type.variable < 0) return static_cast<int>(type.fixed);
  size_t rest = variant.number;
  for (int i = 0; i < type.variable; ++i) {
    rest /= static_cast<size_t>(variant.definition->types[i].count);
  }
  const TypeChoices& choices = variant.definition->types[type.variable];
  return static_cast<int>(choices.elements[rest % static_cast<size_t>(choices.count)]);
}

OrtStatus* to_runtime(const OrtApi* api, const Operator* definition, const Status& status) {
  if (status.ok()) return nullptr;
  char message[640];
  std::snprintf(message, sizeof(message), "nsq.%s: %s", definition->name, status.message());
  return api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

const char* ORT_API_CALL name(const OrtCustomOp* op) { return operator_of(op).name; }
const char* ORT_API_CALL execution_provider(const OrtCustomOp*) { return nullptr; }  // the CPU's
size_t ORT_API_CALL input_count(const OrtCustomOp* op) {
  return static_cast<size_t>(operator_of(op).input_count);
}
size_t ORT_API_CALL output_count(const OrtCustomOp* op) {
  return static_cast<size_t>(operator_of(op).output_count);
}
int ORT_API_CALL input_type(const OrtCustomOp* op, size_t index) {
  return element_of(variant_of(op), operator_of(op).inputs[index].type);
}
int ORT_API_CALL output_type(const OrtCustomOp* op, size_t index) {
  return element_of(variant_of(op), operator_of(op).outputs[index].type);
}
int ORT_API_CALL input_characteristic(const OrtCustomOp* op, size_t index) {
  return operator_of(op).inputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
}
int ORT_API_CALL output_characteristic(const OrtCustomOp* op, size_t index) {
  return operator_of(op).outputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
}
int ORT_API_CALL input_memory(const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; }
int ORT_API_CALL no_variadic(const OrtCustomOp*) { return 0; }
int ORT_API_CALL version(const OrtCustomOp*) { return 1; }

OrtStatus* ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel) {
  const Operator* definition = &operator_of(op);
  *kernel = nullptr;
  void* memory = std::malloc(sizeof(Instance) + definition->kernel_size);
  if (memory == nullptr) return to_runtime(api, definition, Status::error("no memory"));
  auto* instance = new (memory) Instance{api, definition};
  const Status status = definition->create(Attributes(*api, *info), instance + 1);
  if (!status.ok()) {
    std::free(memory);
    return to_runtime(api, definition, status);
  }
  *kernel = memory;
  return nullptr;
}

OrtStatus* ORT_API_CALL compute(void* kernel, OrtKernelContext* context) {
  const auto* instance = static_cast<const Instance*>(kernel);
  const IeeeArithmetic arithmetic;
  Context call(*instance->api, *context, *instance->definition);
  return to_runtime(instance->api, instance->definition,
                    instance->definition->compute(instance + 1, call));
}

void ORT_API_CALL destroy(void* kernel) { std::free(kernel); }

}  // namespace

OrtCustomOp custom_op() {
  OrtCustomOp op{};
  op.version = ORT_ABI_VERSION;
  op.GetName = name;
  op.GetExecutionProviderType = execution_provider;
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = output_type;
  op.GetOutputTypeCount = output_count;
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = input_characteristic;
  op.GetOutputCharacteristic = output_characteristic;
  op.GetInputMemoryType = input_memory;
  op.GetVariadicInputMinArity = no_variadic;
  op.GetVariadicInputHomogeneity = no_variadic;
  op.GetVariadicOutputMinArity = no_variadic;
  op.GetVariadicOutputHomogeneity = no_variadic;
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = version;
  op.GetEndVersion = version;
  return op;
}

}  // namespace nsq
