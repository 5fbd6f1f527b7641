#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels/cpu/dispatch.h"

namespace fips {
namespace {

std::string build_info() {
  std::string info = "{\"version\": \"" FIPS_VERSION "\"";
#if defined(FIPS_CUDA_ARCHS)
  info += ", \"cuda\": true, \"cuda_archs\": \"" FIPS_CUDA_ARCHS "\"";
#else
  info += ", \"cuda\": false, \"cuda_archs\": \"\"";
#endif
#if defined(__x86_64__)
  info += ", \"cpu_isas\": [\"scalar\", \"avx2\", \"avx512\", \"avx512_bf16\", \"amx\"]";
#else
  info += ", \"cpu_isas\": [\"scalar\"]";
#endif
  info += ", \"cpu_isa\": \"" + std::string(cpu::isa_name(cpu::active_isa())) + "\"";
  info += ", \"compiler\": \"" __VERSION__ "\", \"torch_abi\": \"2.11\"}";
  return info;
}

}  // namespace
}  // namespace fips

STABLE_TORCH_LIBRARY_IMPL(fips, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fips::build_info));
}
