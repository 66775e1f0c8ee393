// What operator.h declares: the conversation with onnxruntime.
#include "operator.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace nsq {

Status Status::error(const char* format, ...) {
  Status status;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message_, sizeof(status.message_), format, arguments);
  va_end(arguments);
  return status;
}

const char* name_of(Element element) {
  switch (element) {
    case Element::float32: return "float32";
    case Element::uint8: return "uint8";
    case Element::int32: return "int32";
    case Element::int64: return "int64";
    case Element::float16: return "float16";
    case Element::bfloat16: return "bfloat16";
  }
  return "another type";
}

int64_t size_of(Element element) {
  switch (element) {
    case Element::float32:
    case Element::int32: return 4;
    case Element::int64: return 8;
    case Element::float16:
    case Element::bfloat16: return 2;
    case Element::uint8: return 1;
  }
  return 1;
}

// Tensors.

int64_t Tensor::element_count() const {
  if (!present) return 0;
  int64_t count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= dims[axis];
  return count;
}

namespace {

// A shape as text, such as [2, *, 64].
struct ShapeText {
  ShapeText(const int64_t* dims, int rank) {
    size_t used = 0;
    auto add = [&](const char* format, auto value) {
      const int written = std::snprintf(text + used, sizeof(text) - used, format, value);
      if (written > 0) used += static_cast<size_t>(written);
      if (used >= sizeof(text)) used = sizeof(text) - 1;
    };
    add("%s", "[");
    for (int axis = 0; axis < rank; ++axis) {
      if (axis > 0) add("%s", ", ");
      if (dims[axis] < 0) {
        add("%s", "*");
      } else {
        add("%lld", static_cast<long long>(dims[axis]));
      }
    }
    add("%s", "]");
  }
  char text[160];
};

bool overlap(const Tensor& a, const Tensor& b) {
  const int64_t a_bytes = a.byte_count(), b_bytes = b.byte_count();
  if (a_bytes == 0 || b_bytes == 0) return false;
  const auto a_first = reinterpret_cast<uintptr_t>(a.data);
  const auto b_first = reinterpret_cast<uintptr_t>(b.data);
  return a_first < b_first + static_cast<uintptr_t>(b_bytes) &&
         b_first < a_first + static_cast<uintptr_t>(a_bytes);
}

}  // namespace

Status expect_present(const Tensor& tensor) {
  if (tensor.present) return Status();
  return Status::error("%s is needed, but the node has no such input", tensor.name);
}

Status expect_element(const Tensor& tensor, Element element) {
  if (tensor.element == element) return Status();
  return Status::error("%s has elements of %s, expected %s", tensor.name, name_of(tensor.element),
                       name_of(element));
}

Status expect_rank(const Tensor& tensor, int rank) {
  if (tensor.rank == rank) return Status();
  return Status::error("%s has shape %s, expected %d axes", tensor.name,
                       ShapeText(tensor.dims, tensor.rank).text, rank);
}

Status expect_shape(const Tensor& tensor, const int64_t* dims, int rank) {
  bool same = tensor.rank == rank;
  for (int axis = 0; same && axis < rank; ++axis) {
    same = dims[axis] < 0 || tensor.dims[axis] == dims[axis];
  }
  if (same) return Status();
  return Status::error("%s has shape %s, expected %s", tensor.name,
                       ShapeText(tensor.dims, tensor.rank).text, ShapeText(dims, rank).text);
}

Status expect_apart(const Tensor* outputs, int output_count, const Tensor* inputs, int input_count,
                    const int* own) {
  for (int i = 0; i < output_count; ++i) {
    const int same = own != nullptr ? own[i] : -1;
    const auto shared = [&](const Tensor& other) {
      return Status::error("%s overlaps %s in memory; bind it apart from all others%s%s",
                           outputs[i].name, other.name, same < 0 ? "" : ", or to all of ",
                           same < 0 ? "" : inputs[same].name);
    };
    for (int j = 0; j < input_count; ++j) {
      if (j == same && outputs[i].data == inputs[j].data) continue;
      if (overlap(outputs[i], inputs[j])) return shared(inputs[j]);
    }
    for (int j = 0; j < i; ++j) {
      if (overlap(outputs[i], outputs[j])) return shared(outputs[j]);
    }
  }
  return Status();
}

// Attributes.

bool Attributes::succeeds(OrtStatus* status) const {
  if (status == nullptr) return true;
  api_.ReleaseStatus(status);
  return false;
}

// The runtime answers "absent" and "of another type" with the same code: all types are tried.
bool Attributes::exists(const char* name) const {
  float number = 0;
  int64_t integer = 0;
  size_t size = 0;
  return succeeds(api_.KernelInfoGetAttribute_float(&info_, name, &number)) ||
         succeeds(api_.KernelInfoGetAttribute_int64(&info_, name, &integer)) ||
         succeeds(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size)) ||
         succeeds(api_.KernelInfoGetAttributeArray_float(&info_, name, nullptr, &(size = 0))) ||
         succeeds(api_.KernelInfoGetAttributeArray_int64(&info_, name, nullptr, &(size = 0)));
}

Status Attributes::found_unless_absent(OrtStatus* status, const char* name, const char* type,
                                       bool* found) const {
  *found = succeeds(status);
  if (*found || !exists(name)) return Status();
  return Status::error("attribute %s must be %s", name, type);
}

Status Attributes::get(const char* name, int64_t* value) const {
  int64_t given = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(api_.KernelInfoGetAttribute_int64(&info_, name, &given), name,
                              "an int", &found));
  if (found) *value = given;
  return Status();
}

Status Attributes::get(const char* name, float* value) const {
  float given = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(api_.KernelInfoGetAttribute_float(&info_, name, &given), name,
                              "a float", &found));
  if (found) *value = given;
  return Status();
}

Status Attributes::get(const char* name, bool* value) const {
  int64_t given = *value ? 1 : 0;
  NSQ_TRY(get(name, &given));
  if (given != 0 && given != 1) {
    return Status::error("attribute %s=%lld is not supported; choose one of 0, 1", name,
                         static_cast<long long>(given));
  }
  *value = given == 1;
  return Status();
}

Status Attributes::get(const char* name, int64_t* value, int64_t least) const {
  NSQ_TRY(get(name, value));
  if (*value >= least) return Status();
  return Status::error("attribute %s=%lld is not supported; give an integer of at least %lld", name,
                       static_cast<long long>(*value), static_cast<long long>(least));
}

Status Attributes::get(const char* name, int* choice,
                       std::initializer_list<const char*> choices) const {
  size_t size = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size),
                              name, "a string", &found));
  if (!found) return Status();
  char given[32] = "a longer text";
  if (size <= sizeof(given) &&
      succeeds(api_.KernelInfoGetAttribute_string(&info_, name, given, &size))) {
    for (size_t i = 0; i < choices.size(); ++i) {
      // Compared as bytes: a string may have a 0 inside.
      const char* text = choices.begin()[i];
      if (size == std::strlen(text) + 1 && std::memcmp(given, text, size) == 0) {
        *choice = static_cast<int>(i);
        return Status();
      }
    }
  }
  char allowed[128] = "";
  for (const char* text : choices) {
    const size_t used = std::strlen(allowed);
    std::snprintf(allowed + used, sizeof(allowed) - used, "%s'%s'", used == 0 ? "" : ", ", text);
  }
  return Status::error("attribute %s='%s' is not supported; choose one of %s", name, given,
                       allowed);
}

namespace {

// The name of a field after a prefix.
struct PrefixedName {
  PrefixedName(const char* prefix, const char* field) {
    std::snprintf(text, sizeof(text), "%s%s", prefix, field);
  }
  char text[64];
};

Status get_dtype(const Attributes& attributes, const char* name, Dtype* dtype) {
  int64_t given = static_cast<int64_t>(*dtype);
  NSQ_TRY(attributes.get(name, &given));
  for (Dtype choice : {Dtype::float16, Dtype::bfloat16, Dtype::float32}) {
    if (given == static_cast<int64_t>(choice)) {
      *dtype = choice;
      return Status();
    }
  }
  return Status::error(
      "attribute %s=%lld is not supported; choose one of 10 (float16), 16 (bfloat16), 1 (float32)",
      name, static_cast<long long>(given));
}

}  // namespace

Status Attributes::get(const char* prefix, Scheme* scheme) const {
  const PrefixedName bits(prefix, "bits"), magnitude(prefix, "magnitude"),
      norm_dtype(prefix, "norm_dtype");
  int64_t width = scheme->bits;
  NSQ_TRY(get(bits.text, &width));
  if (width != 2 && width != 3 && width != 4 && width != 8) {
    return Status::error("attribute %s=%lld is not supported; choose one of 2, 3, 4, 8", bits.text,
                         static_cast<long long>(width));
  }
  scheme->bits = static_cast<int>(width);
  NSQ_TRY(get(PrefixedName(prefix, "separate_norm").text, &scheme->separate_norm));
  NSQ_TRY(get(PrefixedName(prefix, "symmetric").text, &scheme->symmetric));
  int axis = scheme->per_token ? 1 : 0;
  NSQ_TRY(get(PrefixedName(prefix, "axis").text, &axis, {"channel", "token"}));
  scheme->per_token = axis == 1;
  int rule = scheme->search ? 1 : 0;
  NSQ_TRY(get(PrefixedName(prefix, "scale_rule").text, &rule, {"range", "search"}));
  scheme->search = rule == 1;
  int factor = static_cast<int>(scheme->magnitude);
  NSQ_TRY(get(magnitude.text, &factor, {"norm", "gain", "lsq"}));
  scheme->magnitude = static_cast<Magnitude>(factor);
  NSQ_TRY(get(PrefixedName(prefix, "block_size").text, &scheme->block_size, 0));
  NSQ_TRY(get(PrefixedName(prefix, "sink_tokens").text, &scheme->sink_tokens, 0));
  NSQ_TRY(get(PrefixedName(prefix, "outlier_channels").text, &scheme->outlier_channels, 0));
  NSQ_TRY(get_dtype(*this, PrefixedName(prefix, "scale_dtype").text, &scheme->scale_dtype));
  NSQ_TRY(get_dtype(*this, norm_dtype.text, &scheme->norm_dtype));
  const Scheme defaults;
  if (!scheme->separate_norm) {
    const char* idle = scheme->magnitude != defaults.magnitude     ? magnitude.text
                       : scheme->norm_dtype != defaults.norm_dtype ? norm_dtype.text
                                                                   : nullptr;
    if (idle != nullptr) {
      return Status::error(
          "attribute %s has no effect with %sseparate_norm=0, which stores no norm; leave %s out "
          "or set %sseparate_norm=1",
          idle, prefix, idle, prefix);
    }
  }
  return Status();
}

// Arithmetic.

#if defined(__SSE2__)

IeeeArithmetic::IeeeArithmetic() : before_(_mm_getcsr()) {
  _mm_setcsr(0x1f80);  // as a program begins: all exceptions are masked
}
IeeeArithmetic::~IeeeArithmetic() { _mm_setcsr(static_cast<unsigned>(before_)); }

#elif defined(__aarch64__)

IeeeArithmetic::IeeeArithmetic() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
IeeeArithmetic::~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

#else

IeeeArithmetic::IeeeArithmetic() = default;
IeeeArithmetic::~IeeeArithmetic() = default;

#endif

// Calls.

Status Context::from_runtime(OrtStatus* status) const {
  if (status == nullptr) return Status();
  Status result = Status::error("onnxruntime: %s", api_.GetErrorMessage(status));
  api_.ReleaseStatus(status);
  return result;
}

Status Context::describe(OrtValue* value, Tensor* tensor) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  NSQ_TRY(from_runtime(api_.GetTensorTypeAndShape(value, &info)));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api_, info};
  int element_type = 0;
  size_t rank = 0;
  NSQ_TRY(from_runtime(api_.GetTensorElementType(info, &element_type)));
  NSQ_TRY(from_runtime(api_.GetDimensionsCount(info, &rank)));
  if (rank > Tensor::max_rank) {
    return Status::error("%s has %zu axes; at most %d are supported", tensor->name, rank,
                         Tensor::max_rank);
  }
  NSQ_TRY(from_runtime(api_.GetDimensions(info, tensor->dims, rank)));
  NSQ_TRY(from_runtime(api_.GetTensorMutableData(value, &tensor->data)));
  tensor->element = static_cast<Element>(element_type);
  tensor->rank = static_cast<int>(rank);
  tensor->present = true;
  return Status();
}

Status Context::input(int index, Tensor* tensor) const {
  *tensor = Tensor();
  tensor->name = definition_.inputs[index].name;
  size_t count = 0;
  NSQ_TRY(from_runtime(api_.KernelContext_GetInputCount(&context_, &count)));
  if (static_cast<size_t>(index) >= count) return Status();  // the node ends before it
  const OrtValue* value = nullptr;
  NSQ_TRY(from_runtime(
      api_.KernelContext_GetInput(&context_, static_cast<size_t>(index), &value)));
  if (value == nullptr) return Status();
  return describe(const_cast<OrtValue*>(value), tensor);
}

Status Context::output(int index, const int64_t* dims, int rank, Tensor* tensor) {
  *tensor = Tensor();
  tensor->name = definition_.outputs[index].name;
  size_t count = 0;
  NSQ_TRY(from_runtime(api_.KernelContext_GetOutputCount(&context_, &count)));
  if (static_cast<size_t>(index) >= count) return Status();
  OrtValue* value = nullptr;
  NSQ_TRY(from_runtime(api_.KernelContext_GetOutput(&context_, static_cast<size_t>(index), dims,
                                                    static_cast<size_t>(rank), &value)));
  if (value == nullptr) return Status();
  return describe(value, tensor);
}

Status Context::run_parallel(void (*function)(void*, size_t), int64_t tasks, void* data) const {
  return from_runtime(api_.KernelContext_ParallelFor(&context_, function,
                                                     static_cast<size_t>(tasks), 0, data));
}

void* allocate_aligned(int64_t count, int64_t times, size_t element_size, void** aligned) {
  constexpr size_t alignment = 64;  // a cache line, and the widest vector
  size_t size = 0;
  *aligned = nullptr;
  if (count < 0 || times < 0 || __builtin_mul_overflow(count, times, &size) ||
      __builtin_mul_overflow(size, element_size, &size) ||
      __builtin_add_overflow(size, alignment, &size)) {
    return nullptr;
  }
  void* memory = std::malloc(size);
  if (memory == nullptr) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  *aligned = reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  return memory;
}

// What onnxruntime calls.

namespace runtime {
namespace {

// What a kernel's pointer points to; the operator's own object follows.
struct alignas(16) Instance {
  const OrtApi* api;
  const Operator* definition;
};

const Variant& variant_of(const OrtCustomOp* op) { return *reinterpret_cast<const Variant*>(op); }

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

}  // namespace

const char* ORT_API_CALL name(const OrtCustomOp* op) { return variant_of(op).definition->name; }
const char* ORT_API_CALL execution_provider(const OrtCustomOp*) { return nullptr; }  // the CPU's
size_t ORT_API_CALL input_count(const OrtCustomOp* op) {
  return static_cast<size_t>(variant_of(op).definition->input_count);
}
size_t ORT_API_CALL output_count(const OrtCustomOp* op) {
  return static_cast<size_t>(variant_of(op).definition->output_count);
}
int ORT_API_CALL input_type(const OrtCustomOp* op, size_t index) {
  const Variant& variant = variant_of(op);
  return element_of(variant, variant.definition->inputs[index].type);
}
int ORT_API_CALL output_type(const OrtCustomOp* op, size_t index) {
  const Variant& variant = variant_of(op);
  return element_of(variant, variant.definition->outputs[index].type);
}
int ORT_API_CALL input_characteristic(const OrtCustomOp* op, size_t index) {
  return variant_of(op).definition->inputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
}
int ORT_API_CALL output_characteristic(const OrtCustomOp* op, size_t index) {
  return variant_of(op).definition->outputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;
}
int ORT_API_CALL input_memory(const OrtCustomOp*, size_t) { return ORT_MEMORY_DEFAULT; }
int ORT_API_CALL no_variadic(const OrtCustomOp*) { return 0; }
int ORT_API_CALL start_version(const OrtCustomOp*) { return 1; }
int ORT_API_CALL end_version(const OrtCustomOp*) { return 1; }

OrtStatus* ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel) {
  const Operator* definition = variant_of(op).definition;
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

}  // namespace runtime
}  // namespace nsq
