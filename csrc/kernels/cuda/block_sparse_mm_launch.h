// The seam between the dispatcher and the translation units that hold the kernels of one element
// type, which are apart so that they compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_sparse_mm_select.h"
#include "kernels/cuda/block_sparse_mm_task.h"

namespace fips::cuda {

struct MmLaunch {
  MmTask task;
  cudaStream_t stream;
};

void launch_mm_bfloat16(const MmChoice& choice, const MmLaunch& launch);
void launch_mm_float16(const MmChoice& choice, const MmLaunch& launch);
void launch_mm_float32(const MmChoice& choice, const MmLaunch& launch);

}  // namespace fips::cuda
