// block_sparse_mm for small blocks and few input features: the tokens of a tile stay in shared
// memory and the stored blocks go straight to registers (strip.cuh). With blocks of 16 or 32 a tile
// that gathers its tokens block by block moves an order of magnitude more bytes.
#pragma once

#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Whether the kernel takes these arguments on `device`: x V of bfloat16 or float16 in the `block`
// encoding, aligned memory, a tile of tokens that fits one multiprocessor.
bool resident_supports(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                       const DeviceInfo& device);

// Whether it is the better choice, too.
bool prefers_resident(const BlockSparseMmParams& params);

void block_sparse_mm_resident(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                              Stream stream);

}  // namespace fips::cuda
