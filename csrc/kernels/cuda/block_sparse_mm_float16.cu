#include "kernels/cuda/block_sparse_mm_mma_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_select.cuh"

namespace fips::cuda {
namespace {

template <class Config>
struct Run {
  static void launch(const MmLaunch& launch) {
    launch_kernel<Config>(block_sparse_mm_mma<Config>, MmaWarps<Config>::kThreads, launch);
  }
};

}  // namespace

void launch_mm_float16(const MmLaunch& launch) { select_kernel<Run, Half>(launch); }

}  // namespace fips::cuda
