// For processors with AVX-512 F, BW, DQ, VL and VNNI.
#define NSQ_ISA avx512
#include "kernels/kernels.inc"
