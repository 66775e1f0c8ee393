// For processors with AVX2, FMA and F16C.
#define NSQ_ISA avx2

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#include "codec.inc"
#include "float_attention.inc"
#include "code_attention.inc"

namespace nsq::NSQ_ISA {

extern const Kernels kernels = {
    "avx2",       encode_block, decode_block, widen,      narrow,
    reads_codes,  score_codes,  add_codes,
    score_floats, add_floats,   largest,      cap,        exponentials,
};

}  // namespace nsq::NSQ_ISA
