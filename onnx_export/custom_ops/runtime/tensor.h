// Tensors, and what an operator may expect of them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/scheme.h"
#include "runtime/ort_abi.h"
#include "runtime/status.h"

namespace nsq {

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
  int64_t bytes = 0;     // of all elements

  explicit operator bool() const { return present; }
  // Of axis `axis`, counted from the end if negative. The axis must exist.
  int64_t dim(int axis) const { return dims[axis < 0 ? axis + rank : axis]; }
  int64_t element_count() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Errors that name the tensor.
Status expect_present(const Tensor& tensor);
// It must be there exactly if the scheme stores it.
Status expect_stored(const Tensor& tensor, bool stored);
Status expect_element(const Tensor& tensor, Element element);
Status expect_rank(const Tensor& tensor, int rank);
// Unless its shape is this one, or it is left out; -1 stands for any number.
Status expect_shape(const Tensor& tensor, const int64_t* dims, int rank);
inline Status expect_shape(const Tensor& tensor, std::initializer_list<int64_t> dims) {
  return expect_shape(tensor, dims.begin(), static_cast<int>(dims.size()));
}
// An error that names two tensors if an output shares memory with an input or with another output.
// own[i] is the input that output i may be in place of, all of it, or -1; no output is in place
// of any without `own`.
Status expect_apart(const Tensor* outputs, int output_count, const Tensor* inputs, int input_count,
                    const int* own = nullptr);

}  // namespace nsq
