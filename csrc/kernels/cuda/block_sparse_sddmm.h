// CUDA implementation of kernels/block_sparse_sddmm.h, for bfloat16 and float16 in the `block`
// encoding; the op layer multiplies densely and gathers for the rest.
#pragma once

#include "kernels/block_sparse_sddmm.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

inline bool has_sddmm_kernel(const BlockSparseView& v) {
  return !v.is_bitmap() && (v.dtype == DType::kBFloat16 || v.dtype == DType::kFloat16);
}

// Bytes of workspace: partial sums of the ranges of tokens that run side by side.
int64_t block_sparse_sddmm_workspace(const BlockSparseSddmmParams& params);

// Deterministic: every sum is made in a fixed order. Only launches on `stream`.
void block_sparse_sddmm(const BlockSparseSddmmParams& params, void* workspace, Stream stream);

}  // namespace fips::cuda
