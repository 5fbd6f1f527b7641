// The current CUDA stream of the running torch. The symbol is weak because one binary serves CPU
// builds of torch too, which do not have it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "core/check.h"

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fips {

inline cudaStream_t current_cuda_stream(int32_t device) {
  FIPS_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr,
      "CUDA: fips_ext is built for CUDA, but this torch has none; install a CUDA build of torch");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of `tensor` current for its lifetime and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(current_cuda_stream(tensor.get_device_index())) {}

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fips
