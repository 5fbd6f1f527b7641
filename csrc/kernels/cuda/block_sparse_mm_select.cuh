// From the run-time description of a launch to the kernel compiled for it.
#pragma once

#include <atomic>
#include <limits>

#include "kernels/cuda/block_sparse_mm_heuristics.h"
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
void launch_kernel(Kernel* kernel, int threads, const MmLaunch& launch) {
  const int64_t blocks =
      ceil_div(launch.task.tokens, Config::kTokens) * launch.task.out_blocks;
  FIPS_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "block_sparse_mm: ", launch.task.tokens,
             " tokens need ", blocks, " thread blocks, at most 2147483647 fit one launch; split x");
  allow_shared_memory<Config>(kernel);
  kernel<<<static_cast<unsigned>(blocks), threads, Config::kSharedBytes, launch.stream>>>(
      launch.task);
  FIPS_CUDA_CHECK(cudaGetLastError());
}

// Run is a class template over a MmConfig with a static `launch(const MmLaunch&)`.
template <template <class> class Run, class T, int kTokens, bool kTransposed, bool kBitmap>
void select_out_edge(const MmLaunch& launch) {
  switch (launch.out_edge) {
    case 16:
      return Run<MmConfig<T, kTokens, 16, kTransposed, kBitmap>>::launch(launch);
    case 32:
      return Run<MmConfig<T, kTokens, 32, kTransposed, kBitmap>>::launch(launch);
    case 64:
      return Run<MmConfig<T, kTokens, 64, kTransposed, kBitmap>>::launch(launch);
    case 128:
      return Run<MmConfig<T, kTokens, 128, kTransposed, kBitmap>>::launch(launch);
    default:
      fail("block_sparse_mm: block edge ", launch.out_edge, "; it must be 16, 32, 64 or 128");
  }
}

template <template <class> class Run, class T, bool kTransposed, bool kBitmap>
void select_token_tile(const MmLaunch& launch) {
  constexpr bool kTall = sizeof(T) == 2 && !kBitmap;  // see largest_token_tile
  if (launch.token_tile == 16) {
    select_out_edge<Run, T, 16, kTransposed, kBitmap>(launch);
  } else if (kTall && launch.token_tile == 128) {
    select_out_edge<Run, T, kTall ? 128 : 64, kTransposed, kBitmap>(launch);
  } else {
    select_out_edge<Run, T, 64, kTransposed, kBitmap>(launch);
  }
}

template <template <class> class Run, class T>
void select_kernel(const MmLaunch& launch) {
  if (launch.transposed) {
    launch.bitmap ? select_token_tile<Run, T, true, true>(launch)
                  : select_token_tile<Run, T, true, false>(launch);
  } else {
    launch.bitmap ? select_token_tile<Run, T, false, true>(launch)
                  : select_token_tile<Run, T, false, false>(launch);
  }
}

}  // namespace fips::cuda
