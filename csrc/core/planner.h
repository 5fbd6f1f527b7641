// Which way a product with a slice runs on the CPU: a pure function of the call, so that it can be
// tested and read. Thresholds are deliberately few.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace fips {

enum class MmPath {
  kSparse,     // our kernels, on stored blocks only
  kDensified,  // V filled up with zeros for this call, then the vendor GEMM
};

struct MmShape {
  int64_t tokens;
  int64_t stored_slots;  // num_blocks * bk * bn
  int64_t rows, cols;
  DType dtype;
  bool bitmap;
};

inline MmPath choose_mm_path(const MmShape& shape) {
  // Filling V up costs a write of the dense matrix; below a few dozen tokens that is all the time
  // there is.
  if (shape.tokens < 32) {
    return MmPath::kSparse;
  }
  if (shape.bitmap) {
    // Its stored blocks are mostly all of them: the vendor's GEMM is a little faster on those,
    // which pays for the filling when it serves enough tokens.
    return shape.tokens < 768 ? MmPath::kSparse : MmPath::kDensified;
  }
  const double density =
      static_cast<double>(shape.stored_slots) / static_cast<double>(shape.rows * shape.cols + 1);
  const bool half = shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16;
  return density <= (half ? 0.6 : 0.8) ? MmPath::kSparse : MmPath::kDensified;
}

// The same choice for the sampled product a^T b, whose fall-back is the whole product and a gather.
// Every stored block of a `bitmap` is multiplied anyway; halves are multiplied in float32, at a
// small part of the vendor's rate.
inline MmPath choose_sddmm_path(const MmShape& shape) {
  if (shape.tokens < 32) {
    return MmPath::kSparse;
  }
  const double density =
      static_cast<double>(shape.stored_slots) / static_cast<double>(shape.rows * shape.cols + 1);
  const bool half = shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16;
  return !shape.bitmap && density <= (half ? 0.25 : 0.6) ? MmPath::kSparse : MmPath::kDensified;
}

inline MmShape mm_shape(const BlockSparseView& v, int64_t tokens) {
  return {tokens, v.num_blocks * v.slots(), v.rows, v.cols, v.dtype, v.is_bitmap()};
}

}  // namespace fips
