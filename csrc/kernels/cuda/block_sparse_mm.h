// CUDA implementation of kernels/block_sparse_mm.h.
#pragma once

#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Every pointer is device memory of the current device; float32, bfloat16 or float16. Only launches
// on `stream`: no allocation, no synchronisation, so it can be captured in a graph. Indices are not
// validated: entries out of range are skipped, never followed. A gate passes through `out`, rounded
// to the element type (on Hopper it may stay in float32).
void block_sparse_mm(const BlockSparseMmParams& params, const MmEpilogue& epilogue, Stream stream);

}  // namespace fips::cuda
