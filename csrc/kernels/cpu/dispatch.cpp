#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <string>

#include "core/check.h"

namespace fips::cpu {

namespace scalar {
extern const KernelTable kTable;
}
#if defined(FIPS_X86)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {
constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
constexpr const char* kVariable = "FIPS_CPU_CAPABILITY";
}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int32_t>(isa)]; }

Isa detect_isa() {
#if defined(FIPS_X86)
  static const Isa detected = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return Isa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c")
               ? Isa::kAvx2
               : Isa::kScalar;
  }();
  return detected;
#else
  return Isa::kScalar;
#endif
}

Isa active_isa() {
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') {
    return detect_isa();
  }
  for (int32_t i = 0; i < 3; ++i) {
    if (std::string(wanted) == kNames[i]) {
      FIPS_CHECK(static_cast<Isa>(i) <= detect_isa(), kVariable, ": got '", wanted,
                 "', but this processor supports at most '", isa_name(detect_isa()), "'");
      return static_cast<Isa>(i);
    }
  }
  fail(kVariable, ": got '", wanted, "'; allowed are scalar, avx2 and avx512 (or leave it unset)");
}

const KernelTable& kernel_table() {
  switch (active_isa()) {
#if defined(FIPS_X86)
    case Isa::kAvx512:
      return avx512::kTable;
    case Isa::kAvx2:
      return avx2::kTable;
#endif
    default:
      return scalar::kTable;
  }
}

}  // namespace fips::cpu
