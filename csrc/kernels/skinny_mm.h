// A few tokens times a dense matrix: the products with the base U [d, r] while decoding, where the
// time is that of reading U once and vendor GEMMs spend several times that.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace fips {

struct SkinnyMmParams {
  DType dtype = DType::kFloat32;
  const void* matrix = nullptr;  // [rows, cols] contiguous
  int64_t rows = 0, cols = 0;
  bool transpose =
      false;  // false: out = x * matrix, [tokens, rows] -> [tokens, cols]
              // true: out = x * matrix^T + bias + addend, [tokens, cols] -> [tokens, rows]
  const void* x = nullptr;  // [tokens, features]
  int64_t tokens = 0;       // meant for kFewTokens
  int64_t x_stride = 0;
  const void* bias = nullptr;    // only with transpose
  const void* addend = nullptr;  // only with transpose: [tokens, rows]
  int64_t addend_stride = 0;
  void* out = nullptr;  // [tokens, outputs]
  int64_t out_stride = 0;

  int64_t in_features() const { return transpose ? cols : rows; }
};

namespace cpu {

// Most tokens that the kernels for a few tokens are meant for.
inline constexpr int64_t kFewTokens = 16;

// Bytes of scratch memory (any content).
int64_t skinny_mm_workspace(const SkinnyMmParams& params);

// Sums in the accumulator type, each in a fixed order whatever the number of threads.
void skinny_mm(const SkinnyMmParams& params, void* workspace, const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
