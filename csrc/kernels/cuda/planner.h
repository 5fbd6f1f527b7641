// Which way a product with a slice runs on a GPU: pure functions of the call (core/planner.h has
// the CPU's).
#pragma once

#include "core/planner.h"

namespace fips::cuda {

inline double stored_density(const MmShape& shape) {
  return static_cast<double>(shape.stored_slots) / static_cast<double>(shape.rows * shape.cols + 1);
}

inline MmPath choose_mm_path(const MmShape& shape) {
  // Few tokens are a matter of bytes: the stored ones are the fewest.
  if (shape.tokens < 64) {
    return MmPath::kSparse;
  }
  if (shape.bitmap) {
    return MmPath::kDensified;  // nearly every block is stored: it is a dense product
  }
  return stored_density(shape) <= 0.65 ? MmPath::kSparse : MmPath::kDensified;
}

// The sampled product a^T b, whose fall-back is the whole product and a gather: the only way for
// what has no kernel (block_sparse_sddmm.h).
inline MmPath choose_sddmm_path(const MmShape& shape) {
  const bool half = shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16;
  return half && !shape.bitmap && stored_density(shape) <= 0.3 ? MmPath::kSparse
                                                               : MmPath::kDensified;
}

}  // namespace fips::cuda
