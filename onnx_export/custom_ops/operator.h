// The base that operators are written with: tensors, attributes, errors, threads, and the
// declaration of an operator as data. Nothing here throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "ort_abi.h"
#include "scheme.h"

namespace nsq {

// Success, or an error with a sentence for the user.
class [[nodiscard]] Status {
 public:
  Status() { message_[0] = '\0'; }
#if defined(__GNUC__)
  __attribute__((format(printf, 1, 2)))
#endif
  static Status error(const char* format, ...);

  bool ok() const { return message_[0] == '\0'; }
  const char* message() const { return message_; }

 private:
  char message_[512];
};

// Returns from the calling function if the expression is an error.
#define NSQ_TRY(expression)                                      \
  do {                                                           \
    if (::nsq::Status status_ = (expression); !status_.ok()) {   \
      return status_;                                            \
    }                                                            \
  } while (false)

// Element types of tensors, numbered as ONNX numbers them.
enum class Element : int32_t {
  float32 = ORT_FLOAT32,
  uint8 = ORT_UINT8,
  int32 = ORT_INT32,
  int64 = ORT_INT64,
  float16 = ORT_FLOAT16,
  bfloat16 = ORT_BFLOAT16,
};

constexpr Element element(Dtype dtype) { return static_cast<Element>(dtype); }
// Of float elements only.
constexpr Dtype dtype(Element element) { return static_cast<Dtype>(element); }
const char* name_of(Element element);
int64_t size_of(Element element);

// An input or an output. One that the model leaves out is not present, and has no axes.
struct Tensor {
  static constexpr int max_rank = 16;

  const char* name = "";
  bool present = false;
  Element element = Element::float32;
  int rank = 0;
  int64_t dims[max_rank] = {};
  void* data = nullptr;  // may be null if there are no elements

  explicit operator bool() const { return present; }
  // Of axis `axis`, counted from the end if negative. The axis must exist.
  int64_t dim(int axis) const { return dims[axis < 0 ? axis + rank : axis]; }
  int64_t element_count() const;
  int64_t byte_count() const { return element_count() * size_of(element); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// An error that names the tensor unless its shape is this one; -1 stands for any number.
Status expect_shape(const Tensor& tensor, const int64_t* dims, int rank);
inline Status expect_shape(const Tensor& tensor, std::initializer_list<int64_t> dims) {
  return expect_shape(tensor, dims.begin(), static_cast<int>(dims.size()));
}
Status expect_rank(const Tensor& tensor, int rank);
Status expect_element(const Tensor& tensor, Element element);
Status expect_present(const Tensor& tensor);
// An error that names two tensors if an output shares memory with an input or with another output.
// own[i] is the input that output i may be in place of, all of it, or -1; no output is in place
// of any without `own`.
Status expect_apart(const Tensor* outputs, int output_count, const Tensor* inputs, int input_count,
                    const int* own = nullptr);

// The attributes of a node. Where the node has no attribute of a name, the value stays as it was,
// which makes it the default; an attribute of another type is an error.
class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo& info) : api_(api), info_(info) {}

  Status get(const char* name, int64_t* value) const;
  Status get(const char* name, float* value) const;
  Status get(const char* name, bool* value) const;  // an int that is 0 or 1
  // An int that is at least `least`.
  Status get(const char* name, int64_t* value, int64_t least) const;
  // One of these strings: its number.
  Status get(const char* name, int* choice, std::initializer_list<const char*> choices) const;
  // The fields of a scheme, each attribute's name after the prefix ("", "key_", "value_"), checked
  // as nsq_ref.Scheme checks them.
  Status get(const char* prefix, Scheme* scheme) const;

 private:
  bool exists(const char* name) const;
  bool succeeds(OrtStatus* status) const;
  Status found_unless_absent(OrtStatus* status, const char* name, const char* type,
                             bool* found) const;

  const OrtApi& api_;
  const OrtKernelInfo& info_;
};

// What `parameters`' element types are: one type, or one that varies from node to node. Varying
// types are numbered as in Declaration::types.
struct Type {
  constexpr Type(Element element) : fixed(element), variable(-1) {}  // NOLINT: meant to convert
  constexpr Type(Element element, int number) : fixed(element), variable(number) {}
  Element fixed;
  int variable;
};
constexpr Type varying(int number) { return Type(Element::float32, number); }

struct Parameter {
  const char* name;
  Type type;
  bool optional = false;
};

// The element types that a varying type can be, the least likely last.
struct TypeChoices {
  constexpr TypeChoices(std::initializer_list<Element> list) : count(0), elements{} {
    for (Element element : list) elements[count++] = element;
  }
  int count;
  Element elements[3];
};

class Context;

// An operator as data.
struct Operator {
  const char* name;
  const TypeChoices* types;
  int type_count;
  const Parameter* inputs;
  int input_count;
  const Parameter* outputs;
  int output_count;
  size_t kernel_size;
  Status (*create)(const Attributes& attributes, void* memory);
  Status (*compute)(const void* kernel, Context& context);
};

// onnxruntime takes the element types of outputs from those of inputs, and wants an OrtCustomOp for
// every combination of them.
struct Variant {
  OrtCustomOp op;  // first: onnxruntime hands a pointer to it back
  const Operator* definition;
  size_t number;  // chooses an element of each varying type
};
struct Variants {
  const Variant* first;
  size_t count;
};

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

// One call of an operator.
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

  // Calls function(task) for every task below `tasks`, on the threads of the session.
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
    return run_parallel(call, tasks, const_cast<Function*>(&function));
  }

 private:
  Status run_parallel(void (*function)(void*, size_t), int64_t tasks, void* data) const;
  Status describe(OrtValue* value, Tensor* tensor) const;
  Status from_runtime(OrtStatus* status) const;

  const OrtApi& api_;
  OrtKernelContext& context_;
  const Operator& definition_;
};

// Memory for the time of a call, not initialised, aligned for vectors.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Memory of the product of these counts; what was there before is given back.
  Status allocate(int64_t count, int64_t times = 1);
  T* data() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

// Null if there is no such memory, or its size is beyond what can be asked for. `*aligned` points
// into the memory returned.
void* allocate_aligned(int64_t count, int64_t times, size_t element_size, void** aligned);

template <typename T>
Status Scratch<T>::allocate(int64_t count, int64_t times) {
  std::free(memory_);
  void* aligned = nullptr;
  memory_ = allocate_aligned(count, times, sizeof(T), &aligned);
  data_ = static_cast<T*>(aligned);
  if (memory_ != nullptr) return Status();
  return Status::error("no memory for %lld x %lld elements of %zu bytes",
                       static_cast<long long>(count), static_cast<long long>(times), sizeof(T));
}

// What onnxruntime calls, for the operator of any variant.
namespace runtime {
const char* ORT_API_CALL name(const OrtCustomOp* op);
const char* ORT_API_CALL execution_provider(const OrtCustomOp* op);
int ORT_API_CALL input_type(const OrtCustomOp* op, size_t index);
size_t ORT_API_CALL input_count(const OrtCustomOp* op);
int ORT_API_CALL output_type(const OrtCustomOp* op, size_t index);
size_t ORT_API_CALL output_count(const OrtCustomOp* op);
int ORT_API_CALL input_characteristic(const OrtCustomOp* op, size_t index);
int ORT_API_CALL output_characteristic(const OrtCustomOp* op, size_t index);
int ORT_API_CALL input_memory(const OrtCustomOp* op, size_t index);
int ORT_API_CALL no_variadic(const OrtCustomOp* op);
int ORT_API_CALL start_version(const OrtCustomOp* op);
int ORT_API_CALL end_version(const OrtCustomOp* op);
OrtStatus* ORT_API_CALL create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel);
OrtStatus* ORT_API_CALL compute(void* kernel, OrtKernelContext* context);
void ORT_API_CALL destroy(void* kernel);
}  // namespace runtime

constexpr OrtCustomOp custom_op() {
  OrtCustomOp op{};
  op.version = ORT_ABI_VERSION;
  op.GetName = runtime::name;
  op.GetExecutionProviderType = runtime::execution_provider;
  op.GetInputType = runtime::input_type;
  op.GetInputTypeCount = runtime::input_count;
  op.GetOutputType = runtime::output_type;
  op.GetOutputTypeCount = runtime::output_count;
  op.KernelDestroy = runtime::destroy;
  op.GetInputCharacteristic = runtime::input_characteristic;
  op.GetOutputCharacteristic = runtime::output_characteristic;
  op.GetInputMemoryType = runtime::input_memory;
  op.GetVariadicInputMinArity = runtime::no_variadic;
  op.GetVariadicInputHomogeneity = runtime::no_variadic;
  op.GetVariadicOutputMinArity = runtime::no_variadic;
  op.GetVariadicOutputHomogeneity = runtime::no_variadic;
  op.CreateKernelV2 = runtime::create;
  op.KernelComputeV2 = runtime::compute;
  op.GetStartVersion = runtime::start_version;
  op.GetEndVersion = runtime::end_version;
  return op;
}

template <typename Kernel>
struct Definition {
  template <typename Item, size_t size>
  static constexpr int length(const Item (&)[size]) {
    return static_cast<int>(size);
  }
  static constexpr size_t count_combinations() {
    size_t count = 1;
    for (const TypeChoices& choices : Kernel::types) count *= static_cast<size_t>(choices.count);
    return count;
  }
  // One object serves all calls of a node, and is given back as memory.
  static_assert(std::is_trivially_destructible<Kernel>::value, "a kernel holds values only");
  static Status create(const Attributes& attributes, void* memory) {
    return (new (memory) Kernel)->create(attributes);
  }
  static Status compute(const void* kernel, Context& context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
  }
  static constexpr Operator definition = {
      Kernel::name,    Kernel::types,           length(Kernel::types), Kernel::inputs,
      length(Kernel::inputs), Kernel::outputs, length(Kernel::outputs), sizeof(Kernel),
      create,          compute,
  };
  struct List {
    Variant items[count_combinations()];
  };
  static constexpr List list() {
    List result{};
    for (size_t i = 0; i < count_combinations(); ++i) {
      result.items[i] = Variant{custom_op(), &definition, i};
    }
    return result;
  }
};

template <typename Kernel>
constexpr auto variants_of = Definition<Kernel>::list();

// Makes an operator from a class, one object of which serves one node:
//
//   struct Quantize {
//     static constexpr const char* name = "Quantize";
//     static constexpr TypeChoices types[] = {{Element::float32, Element::float16}};  // at least 1
//     static constexpr Parameter inputs[] = {{"x", varying(0)}, ...};
//     static constexpr Parameter outputs[] = {{"packed", Element::uint8}, ...};
//     Status create(const Attributes& attributes);  // reads attributes into members
//     Status compute(Context& context) const;       // may run on several threads at once
//   };
//   extern const Variants quantize_operator;
//   const Variants quantize_operator = define_operator<Quantize>();
template <typename Kernel>
constexpr Variants define_operator() {
  return {variants_of<Kernel>.items, sizeof(variants_of<Kernel>.items) / sizeof(Variant)};
}

// --- what the environment chooses, once a session ------------------------------------------------

struct Kernels;

// The best kernels that this processor can run, or those that the variable NSQ_CPU names (portable,
// avx2, avx512); an error if it names what cannot run.
Status choose_kernels(const Kernels** kernels);

// True if the variable NSQ_EXACT is set and not 0: codes are then decoded and all arithmetic of
// attention is float32.
bool exact_attention();

}  // namespace nsq
