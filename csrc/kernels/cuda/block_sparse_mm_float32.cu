#include "kernels/cuda/block_sparse_mm_ffma_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_select.cuh"

namespace fips::cuda {
namespace {

template <class Config>
struct Run {
  static void launch(const MmLaunch& launch) {
    launch_kernel<Config>(block_sparse_mm_ffma<Config>, FfmaThreads<Config>::kThreads, launch);
  }
};

}  // namespace

void launch_mm_float32(const MmLaunch& launch) { select_kernel<Run, float>(launch); }

}  // namespace fips::cuda
