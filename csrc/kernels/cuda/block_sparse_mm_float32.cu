#include "kernels/cuda/block_sparse_mm_ffma_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_run.cuh"

namespace fips::cuda {
namespace {

template <class Config>
struct Run {
  static void launch(const MmLaunch& launch) {
    run_kernel<Config>(block_sparse_mm_ffma<Config>, FfmaThreads<Config>::kThreads, launch);
  }
};

}  // namespace

void launch_mm_float32(const MmChoice& choice, const MmLaunch& launch) {
  MmSelect<MmConfig, Run, float>::launch(choice, launch);
}

}  // namespace fips::cuda
