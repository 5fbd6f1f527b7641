// The seam between the dispatcher and the translation units that hold the kernels of one element type,
// which are apart so that they compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_sparse_mm_task.h"

namespace fips::cuda {

struct MmLaunch {
  MmTask task;
  bool transposed;
  bool bitmap;
  int out_edge;    // block edge along the outputs: 16, 32, 64 or 128
  int token_tile;  // 16, 64 or 128 (heuristics.h)
  cudaStream_t stream;
};

void launch_mm_bfloat16(const MmLaunch& launch);
void launch_mm_float16(const MmLaunch& launch);
void launch_mm_float32(const MmLaunch& launch);

}  // namespace fips::cuda
