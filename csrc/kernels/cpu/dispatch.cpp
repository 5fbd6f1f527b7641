#include "kernels/cpu/dispatch.h"

#if defined(FIPS_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace avx512_bf16 {
extern const KernelTable kTable;
}
namespace amx {
extern const KernelTable kTable;
}
#endif

namespace {
constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr const char* kVariable = "FIPS_CPU_CAPABILITY";

#if defined(FIPS_X86)
// The kernel hands out the tile registers' state only to a process that asks for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))) {
    return Isa::kScalar;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
    return Isa::kAvx2;
  }
  if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2"))) {
    return Isa::kAvx512;
  }
  // CPUID leaf 7, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE (no name for them in GCC 12).
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
                     (edx & (1u << 22)) != 0 && (edx & (1u << 24)) != 0;
  return tiles && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#endif
}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int32_t>(isa)]; }

Isa detect_isa() {
#if defined(FIPS_X86)
  static const Isa detected = detect();
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
  for (int32_t i = 0; i < kIsaCount; ++i) {
    if (std::string(wanted) == kNames[i]) {
      FIPS_CHECK(static_cast<Isa>(i) <= detect_isa(), kVariable, ": got '", wanted,
                 "', but this processor supports at most '", isa_name(detect_isa()), "'");
      return static_cast<Isa>(i);
    }
  }
  fail(kVariable, ": got '", wanted,
       "'; allowed are scalar, avx2, avx512, avx512_bf16 and amx (or leave it unset)");
}

const KernelTable& kernel_table() {
  switch (active_isa()) {
#if defined(FIPS_X86)
    case Isa::kAmx:
      return amx::kTable;
    case Isa::kAvx512Bf16:
      return avx512_bf16::kTable;
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
