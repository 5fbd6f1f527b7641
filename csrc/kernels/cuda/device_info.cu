#include "kernels/cuda/device_info.h"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {

#if defined(FIPS_HOST_EMULATION)

DeviceInfo current_device() { return emulation::device(); }

#else

DeviceInfo current_device() {
  int device = 0;
  FIPS_CUDA_CHECK(cudaGetDevice(&device));
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    FIPS_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

#endif

}  // namespace fips::cuda
