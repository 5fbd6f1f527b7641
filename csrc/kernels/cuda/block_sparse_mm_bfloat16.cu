#include "kernels/cuda/block_sparse_mm_mma_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_run.cuh"

namespace fips::cuda {
namespace {

template <class Config>
struct Run {
  static void launch(const MmLaunch& launch) {
    run_kernel<Config>(block_sparse_mm_mma<Config>, MmaWarps<Config>::kThreads, launch);
  }
};

}  // namespace

void launch_mm_bfloat16(const MmChoice& choice, const MmLaunch& launch) {
  MmSelect<MmConfig, Run, BFloat16>::launch(choice, launch);
}

}  // namespace fips::cuda
