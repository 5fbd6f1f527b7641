// CUDA implementation of kernels/block_sparse_mm.h.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/block_sparse_mm.h"

namespace fips::cuda {

// Every pointer in `params` is device memory of the current device; float32, bfloat16 or float16.
// Only launches on `stream`: no allocation, no synchronisation, so it can be captured in a graph.
// Indices are not validated: entries out of range are skipped, never followed.
void block_sparse_mm(const BlockSparseMmParams& params, cudaStream_t stream);

}  // namespace fips::cuda
