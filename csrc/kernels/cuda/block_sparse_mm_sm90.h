// block_sparse_mm on Hopper GPUs (compute capability 9.0) with tensor copies and warpgroup
// products.
#pragma once

#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Call only when sm90_supports (block_sparse_mm_sm90_heuristics.h) holds on a current device of
// capability 90; otherwise as block_sparse_mm, except that a gate stays in float32.
void block_sparse_mm_sm90(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                          Stream stream);

}  // namespace fips::cuda
