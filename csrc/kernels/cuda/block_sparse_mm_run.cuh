// Starts one block_sparse_mm kernel.
#pragma once

#include <atomic>
#include <limits>

#include "kernels/cuda/block_sparse_mm_launch.h"
#include "kernels/cuda/block_sparse_mm_load.cuh"
#include "kernels/cuda/cuda_check.cuh"

namespace fips::cuda {

// More than 48 KiB of shared memory needs a permission, once per kernel and device.
template <class Config, class Kernel>
void allow_shared_memory(Kernel* kernel) {
  static std::atomic<uint64_t> allowed{0};  // one bit per device
  int device = 0;
  FIPS_CUDA_CHECK(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) {
    return;
  }
  FIPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       Config::kSharedBytes));
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

template <class Config, class Kernel>
void run_kernel(Kernel* kernel, int threads, const MmLaunch& launch) {
  const int64_t blocks = ceil_div(launch.task.tokens, Config::kTokens) * launch.task.out_blocks;
  FIPS_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "block_sparse_mm: ", launch.task.tokens,
             " tokens need ", blocks, " thread blocks, at most 2147483647 fit one launch; split x");
  allow_shared_memory<Config>(kernel);
  kernel<<<static_cast<unsigned>(blocks), threads, Config::kSharedBytes, launch.stream>>>(
      launch.task);
  FIPS_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fips::cuda
