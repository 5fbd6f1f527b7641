// Which way a product with a slice runs on a GPU: pure functions of the call (core/planner.h has
// the CPU's).
#pragma once

#include "core/planner.h"
#include "kernels/cuda/tuning_table.h"

namespace fips::cuda {

inline double stored_density(const MmShape& shape) {
  return static_cast<double>(shape.stored_slots) / static_cast<double>(shape.rows * shape.cols + 1);
}

inline MmPath choose_mm_path(const MmShape& shape, const Tuning& tuning) {
  // Few tokens are a matter of bytes: the stored ones are the fewest.
  if (shape.tokens < tuning.dense_tokens) {
    return MmPath::kSparse;
  }
  if (shape.bitmap) {  // nearly every block is stored: it is a dense product
    return shape.tokens < tuning.bitmap_dense_tokens ? MmPath::kSparse : MmPath::kDensified;
  }
  return stored_density(shape) <= tuning.mm_density ? MmPath::kSparse : MmPath::kDensified;
}

// The sampled product a^T b, whose fall-back is the whole product and a gather: the only way for
// what has no kernel (block_sparse_sddmm.h).
inline MmPath choose_sddmm_path(const MmShape& shape, const Tuning& tuning) {
  const bool half = shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16;
  return half && !shape.bitmap && stored_density(shape) <= tuning.sddmm_density
             ? MmPath::kSparse
             : MmPath::kDensified;
}

}  // namespace fips::cuda
