// Plain C++: for processors without the instructions that the other two need.
#define NSQ_ISA portable

#include <cmath>
#include <cstring>

#include "kernels.h"

#include "codec.inc"
#include "float_attention.inc"
#include "code_attention.inc"

namespace nsq::NSQ_ISA {

extern const Kernels kernels = {
    "portable",       encode_block, decode_block, widen,      narrow,
    reads_codes,  score_codes,  add_codes,
    score_floats, add_floats,   largest,      cap,        exponentials,
};

}  // namespace nsq::NSQ_ISA
