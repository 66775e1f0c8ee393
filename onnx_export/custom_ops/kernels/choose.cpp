#include "kernels/choose.h"

#include <cstdlib>
#include <cstring>

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

struct InstructionSet {
  const char* name;
  const char* remark;  // for who asks for it in vain
  const Kernels* kernels;  // null if the library is built without it
  bool (*runs)();
};

bool always() { return true; }

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

constexpr const Kernels *kAvx512 = &avx512::kernels, *kAvx2 = &avx2::kernels;
#else
constexpr auto has_avx2 = always, has_avx512 = always;
constexpr const Kernels *kAvx512 = nullptr, *kAvx2 = nullptr;
#endif

// The best first.
constexpr InstructionSet kSets[] = {
    {"avx512", " (AVX-512 with VNNI)", kAvx512, has_avx512},
    {"avx2", "", kAvx2, has_avx2},
    {"portable", "", &portable::kernels, always},
};

}  // namespace

Status choose_kernels(const Kernels** kernels) {
  const char* name = std::getenv("NSQ_CPU");
  const bool any = name == nullptr || *name == '\0';
  for (const InstructionSet& set : kSets) {
    if (!any && std::strcmp(name, set.name) != 0) continue;
    *kernels = set.kernels;
    if (set.kernels != nullptr && set.runs()) return Status();
    if (any) continue;
    return Status::error("the environment variable NSQ_CPU is %s, which this machine cannot run%s; "
                         "unset it", set.name, set.remark);
  }
  return Status::error("the environment variable NSQ_CPU is none of portable, avx2, avx512; choose "
                       "one, or unset it for the best that this machine can run");
}

bool exact_attention() {
  const char* value = std::getenv("NSQ_EXACT");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

}  // namespace nsq
