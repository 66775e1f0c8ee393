#include "runtime/threads.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace nsq {

#if defined(__SSE2__)

IeeeArithmetic::IeeeArithmetic() : before_(_mm_getcsr()) {
  _mm_setcsr(0x1f80);  // as a program begins: all exceptions are masked
}
IeeeArithmetic::~IeeeArithmetic() { _mm_setcsr(static_cast<unsigned>(before_)); }

#elif defined(__aarch64__)

IeeeArithmetic::IeeeArithmetic() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
IeeeArithmetic::~IeeeArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

#else

IeeeArithmetic::IeeeArithmetic() = default;
IeeeArithmetic::~IeeeArithmetic() = default;

#endif

}  // namespace nsq
