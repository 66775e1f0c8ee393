// For processors without the instructions that the other two need; plain C++.
#define NSQ_ISA portable
#include "kernels/kernels.inc"
