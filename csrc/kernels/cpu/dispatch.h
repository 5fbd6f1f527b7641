// Run-time choice of the instruction set. Kernels are compiled once per set, each in its own
// translation unit and namespace; only plain function pointers cross between them.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/dense_fill.h"

namespace fips::cpu {

enum class Isa : int32_t { kScalar, kAvx2, kAvx512 };

struct KernelTable {
  // block_sparse_mm: tokens per register tile, and the stages (see block_sparse_mm_impl.h).
  int64_t (*mm_token_tile)(DType dtype);
  int64_t (*mm_tiles_per_task)(const BlockSparseMmParams& params);
  void (*mm_pack)(const BlockSparseMmParams& params, void* packed, int64_t begin, int64_t end);
  void (*mm_tiled)(const BlockSparseMmParams& params, const void* packed, int64_t begin,
                   int64_t end);
  void (*mm_stream)(const BlockSparseMmParams& params, const void* rows, int64_t begin,
                    int64_t end);
  void (*sddmm)(const BlockSparseSddmmParams& params, int64_t begin, int64_t end);
  void (*fill)(const BlockSparseView& v, void* out, int64_t begin, int64_t end);
  void (*gather)(const GatherParams& params, int64_t begin, int64_t end);
  void (*activation_forward)(const ActivationParams& params, int64_t begin, int64_t end);
  void (*activation_backward)(const ActivationParams& params, int64_t begin, int64_t end);
};

const char* isa_name(Isa isa);

// Best instruction set of this processor.
Isa detect_isa();

// detect_isa(), or what the environment variable FIPS_CPU_CAPABILITY asks for (scalar, avx2,
// avx512). Throws when that name is unknown or the processor lacks it. Read at every call, so that
// tests can switch.
Isa active_isa();

const KernelTable& kernel_table();

// Most tokens that the decode kernels (mm_stream) take; more go through the tiled kernels.
inline constexpr int64_t kStreamTokens = 8;

}  // namespace fips::cpu
