// Which instruction set runs, and what else the environment chooses.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "operator.h"

#ifdef NSQ_X86
#include <cpuid.h>
#endif

namespace nsq {

namespace portable {
extern const Kernels kernels;
}
#ifdef NSQ_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef NSQ_X86
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1U << 29)) != 0;
}

// The builtins ask the operating system too, whether it keeps the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

const Kernels* avx2_kernels() { return has_avx2() ? &avx2::kernels : nullptr; }
const Kernels* avx512_kernels() { return has_avx512() ? &avx512::kernels : nullptr; }
#else
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif

}  // namespace

Status choose_kernels(const Kernels** kernels) {
  const char* name = std::getenv("NSQ_CPU");
  if (name == nullptr || *name == '\0') {
    *kernels = avx512_kernels();
    if (*kernels == nullptr) *kernels = avx2_kernels();
    if (*kernels == nullptr) *kernels = &portable::kernels;
    return Status();
  }
  const char* problem =
      "the environment variable NSQ_CPU is none of portable, avx2, avx512; choose one, or unset "
      "it for the best that this machine can run";
  *kernels = nullptr;
  if (std::strcmp(name, "portable") == 0) {
    *kernels = &portable::kernels;
  } else if (std::strcmp(name, "avx2") == 0) {
    problem = "the environment variable NSQ_CPU is avx2, which this machine cannot run; unset it";
    *kernels = avx2_kernels();
  } else if (std::strcmp(name, "avx512") == 0) {
    problem =
        "the environment variable NSQ_CPU is avx512, which this machine cannot run (AVX-512 with "
        "VNNI); unset it";
    *kernels = avx512_kernels();
  }
  return *kernels != nullptr ? Status() : Status::error("%s", problem);
}

bool exact_attention() {
  const char* value = std::getenv("NSQ_EXACT");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

}  // namespace nsq
