// For processors with AVX2, FMA and F16C.
#define NSQ_ISA avx2
#include "kernels/kernels.inc"
