// The operators of the domain "nsq", and what their files share.
#pragma once

#include "kernels/scheme.h"
#include "runtime/operator.h"

namespace nsq {

extern const Variants quantize_operator;
extern const Variants dequantize_operator;
extern const Variants attention_operator;
extern const Variants buffer_attention_operator;

// The stored dtypes, the default first.
constexpr TypeChoices kStoredTypes = {Element::float16, Element::bfloat16, Element::float32};

// The fields of a scheme, checked as nsq_ref.Scheme checks them.
Status read_scheme(const Attributes& attributes, Scheme* scheme);

}  // namespace nsq
