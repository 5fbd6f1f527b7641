// Where the CUDA ops run and are registered. With FIPS_HOST_EMULATION the same ops, kernels
// included, run on CPU tensors as torch.ops.fips_emulated.*, which is how machines without a GPU
// test them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "core/check.h"
#include "kernels/cuda/stream.h"

#if defined(FIPS_HOST_EMULATION)

#define FIPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fips_emulated, CPU, m)

namespace fips {

class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor&) {}
  cuda::Stream stream() const { return nullptr; }
};

}  // namespace fips

#else

#include <torch/csrc/stable/accelerator.h>

#define FIPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fips, CUDA, m)

// The symbol is weak because one binary serves CPU builds of torch too, which do not have it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fips {

inline cuda::Stream current_cuda_stream(int32_t device) {
  FIPS_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr,
      "CUDA: fips_ext is built for CUDA, but this torch has none; install a CUDA build of torch");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cuda::Stream>(stream);
}

// Makes the device of `tensor` current for its lifetime and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(current_cuda_stream(tensor.get_device_index())) {}

  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

}  // namespace fips

#endif
