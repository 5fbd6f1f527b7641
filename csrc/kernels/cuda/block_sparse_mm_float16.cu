#include "kernels/cuda/block_sparse_mm_launch.cuh"

namespace fips::cuda {

template void launch_mm<Half>(const MmChoice& choice, const MmTask& task, Stream stream);

}  // namespace fips::cuda
