#include "kernels/cuda/shared_mlp_decode_launch.cuh"

namespace fips::cuda {

template void launch_decode<float>(DecodeTask task, int max_shared_bytes, Stream stream);

}  // namespace fips::cuda
