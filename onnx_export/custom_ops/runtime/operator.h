// An operator as data, and how one is made from a class.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <new>
#include <type_traits>

#include "runtime/attributes.h"
#include "runtime/tensor.h"

namespace nsq {

// The element type of a parameter: one, or one that varies from node to node. Varying types are
// numbered as in `Operator::types`.
struct Type {
  constexpr Type(Element element) : fixed(element), variable(-1) {}  // NOLINT: meant to convert
  constexpr Type(Element element, int number) : fixed(element), variable(number) {}
  Element fixed;
  int variable;
};
constexpr Type varying(int number) { return Type(Element::float32, number); }

// An input or an output.
struct Parameter {
  const char* name = "";
  Type type = Element::float32;
  bool optional = false;
};
constexpr bool kOptional = true;

// Several lists of parameters as one.
template <size_t... sizes>
constexpr std::array<Parameter, (sizes + ...)> joined(const Parameter (&...lists)[sizes]) {
  std::array<Parameter, (sizes + ...)> all{};
  size_t count = 0;
  const auto append = [&](const Parameter* list, size_t size) {
    for (size_t i = 0; i < size; ++i) all[count++] = list[i];
  };
  (append(lists, sizes), ...);
  return all;
}

// The element types that a varying type can be, the least likely last.
struct TypeChoices {
  constexpr TypeChoices(std::initializer_list<Element> list) : count(0), elements{} {
    for (Element element : list) elements[count++] = element;
  }
  int count;
  Element elements[3];
};

class Context;

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

// Functions that serve the operator of any variant.
OrtCustomOp custom_op();

template <typename Kernel>
struct Definition {
  static constexpr size_t combinations() {
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
  static constexpr Operator value = {
      Kernel::name,
      std::data(Kernel::types),
      static_cast<int>(std::size(Kernel::types)),
      std::data(Kernel::inputs),
      static_cast<int>(std::size(Kernel::inputs)),
      std::data(Kernel::outputs),
      static_cast<int>(std::size(Kernel::outputs)),
      sizeof(Kernel),
      create,
      compute,
  };
};

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
//   const Variants quantize_operator = define_operator<Quantize>();
template <typename Kernel>
Variants define_operator() {
  static Variant list[Definition<Kernel>::combinations()];
  size_t count = 0;
  for (Variant& variant : list) variant = {custom_op(), &Definition<Kernel>::value, count++};
  return {list, count};
}

}  // namespace nsq
