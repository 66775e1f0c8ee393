#include "runtime/tensor.h"

namespace nsq {
namespace {

struct ElementType {
  Element element;
  const char* name;
  int64_t size;
};

constexpr ElementType kElementTypes[] = {
    {Element::float32, "float32", 4}, {Element::float16, "float16", 2},
    {Element::bfloat16, "bfloat16", 2}, {Element::uint8, "uint8", 1},
    {Element::int32, "int32", 4}, {Element::int64, "int64", 8},
};

ElementType type_of(Element element) {
  for (const ElementType& type : kElementTypes) {
    if (type.element == element) return type;
  }
  return {element, "another type", 1};
}

// A shape as text, such as [2, *, 64].
Text text_of(const int64_t* dims, int rank) {
  Text shape;
  for (int axis = 0; axis < rank; ++axis) {
    shape.add(axis > 0 ? ", " : "[");
    if (dims[axis] < 0) {
      shape.add("*");
    } else {
      shape.add("%lld", shown(dims[axis]));
    }
  }
  shape.add(rank > 0 ? "]" : "[]");
  return shape;
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto a_first = reinterpret_cast<uintptr_t>(a.data);
  const auto b_first = reinterpret_cast<uintptr_t>(b.data);
  return a.bytes > 0 && b.bytes > 0 && a_first < b_first + static_cast<uintptr_t>(b.bytes) &&
         b_first < a_first + static_cast<uintptr_t>(a.bytes);
}

}  // namespace

const char* name_of(Element element) { return type_of(element).name; }
int64_t size_of(Element element) { return type_of(element).size; }

int64_t Tensor::element_count() const {
  if (!present) return 0;
  int64_t count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= dims[axis];
  return count;
}

Status expect_present(const Tensor& tensor) {
  if (tensor.present) return Status();
  return Status::error("%s is needed, but the node has no such input", tensor.name);
}

Status expect_stored(const Tensor& tensor, bool stored) {
  if (tensor.present == stored) return Status();
  return Status::error(stored ? "%s is left out, but the scheme of the attributes stores it"
                              : "%s is not stored by the scheme of the attributes; leave it out",
                       tensor.name);
}

Status expect_element(const Tensor& tensor, Element element) {
  if (tensor.element == element) return Status();
  return Status::error("%s has elements of %s, expected %s", tensor.name, name_of(tensor.element),
                       name_of(element));
}

Status expect_rank(const Tensor& tensor, int rank) {
  if (tensor.rank == rank) return Status();
  return Status::error("%s has shape %s, expected %d axes", tensor.name,
                       text_of(tensor.dims, tensor.rank).text, rank);
}

Status expect_shape(const Tensor& tensor, const int64_t* dims, int rank) {
  if (!tensor) return Status();
  bool same = tensor.rank == rank;
  for (int axis = 0; same && axis < rank; ++axis) {
    same = dims[axis] < 0 || tensor.dims[axis] == dims[axis];
  }
  if (same) return Status();
  return Status::error("%s has shape %s, expected %s", tensor.name,
                       text_of(tensor.dims, tensor.rank).text, text_of(dims, rank).text);
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

}  // namespace nsq
