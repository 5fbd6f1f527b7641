#include "kernels/cuda/block_sparse_mm_sm90_launch.cuh"

namespace fips::cuda {

template void launch_sm90<BFloat16>(const Sm90Choice& choice, const Sm90Task& task, Stream stream);

}  // namespace fips::cuda
