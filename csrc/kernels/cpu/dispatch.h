// Run-time choice of the instruction set. Kernels are compiled once per set, each in its own
// translation unit and namespace; only plain function pointers cross between them.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/dense_fill.h"
#include "kernels/skinny_mm.h"

namespace fips::cpu {

// Each includes those before it. kAvx512Bf16 also needs VBMI2; kAmx is AVX-512-BF16 with tiles.
enum class Isa : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };
inline constexpr int32_t kIsaCount = 5;

// One product, or one range of its tokens.
struct MmTask {
  BlockSparseMmParams params;
  MmEpilogue epilogue;
  std::atomic<bool>* stray;     // set when an index points outside
  int64_t padded;               // inputs, rounded up to whole blocks
  bool bypass = false;          // write whole lines of the output past the caches
  int64_t group = 0;            // mm_tiled: tokens per task, a multiple of the panel's rows
  const void* panel = nullptr;  // mm_tiled: packed x
};

// How mm_tiled wants x: [tokens / rows] panels of [padded * rows] elements.
struct MmPanel {
  int64_t rows;
  int64_t element_size;
};

struct KernelTable {
  // block_sparse_mm: mm_stream for up to mm_stream_tokens tokens, mm_tiled for any number.
  int64_t (*mm_stream_tokens)(const BlockSparseMmParams& params);
  int64_t (*mm_stream_element)(const MmTask& task);
  void (*mm_stream_pack)(const MmTask& task, void* rows);
  void (*mm_stream)(const MmTask& task, int64_t begin, int64_t end);
  MmPanel (*mm_panel)(DType dtype);
  int64_t (*mm_max_group)(const MmTask& task);
  void (*mm_pack)(const MmTask& task, void* panel, int64_t begin, int64_t end);
  void (*mm_tiled)(const MmTask& task, int64_t begin, int64_t end);
  void (*skinny_pack)(const SkinnyMmParams& params, void* packed);
  void (*skinny_mm)(const SkinnyMmParams& params, const void* packed, int64_t begin, int64_t end);
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
// avx512, avx512_bf16, amx). Throws when that name is unknown or the processor lacks it. Read at
// every call, so that tests can switch.
Isa active_isa();

const KernelTable& kernel_table();

// Most tokens that mm_stream takes without tile registers; with them it takes kFewTokens.
inline constexpr int64_t kVectorTokens = 8;

}  // namespace fips::cpu
