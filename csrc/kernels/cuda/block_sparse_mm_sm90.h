// block_sparse_mm on Hopper GPUs (compute capability 9.0) with tensor copies and warpgroup
// products: one kernel that streams x and weights, one that keeps x in shared memory.
#pragma once

#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_mm_sm90_heuristics.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Whether the kernels run this product: bfloat16 or float16 in `block` encoding with edges of 64 or
// 128, more than 64 tokens, and tensors as the copy engine takes them (16-byte alignment of
// addresses and strides). A gate must have the same grid; the transposed product takes neither gate
// nor activation. Looks at no index.
bool sm90_supports(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const DeviceInfo& device);

// The plan with the least traffic from L2 (choose_sm90_plan).
Sm90Plan sm90_plan(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const DeviceInfo& device);

// Call only when sm90_supports holds on a current device of capability 90. As block_sparse_mm,
// except that a gate stays in float32. Throws when `plan` names a kernel that does not exist for
// the call.
void block_sparse_mm_sm90(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                          const Sm90Plan& plan, Stream stream);

}  // namespace fips::cuda
