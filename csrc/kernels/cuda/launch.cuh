// Starts a kernel: on a GPU, or with FIPS_HOST_EMULATION block by block on the CPU, so that tests
// run the host side of an op (choice of kernel, grid, workspace) as well as the kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "core/check.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/stream.h"

#if !defined(FIPS_HOST_EMULATION)
#include "kernels/cuda/cuda_check.cuh"
#endif

namespace fips::cuda {

struct LaunchShape {
  int64_t blocks;  // 0: nothing to do
  int threads;
  int shared_bytes = 0;  // dynamic shared memory
};

inline void check_launch(const char* op, const LaunchShape& shape) {
  FIPS_CHECK(shape.blocks <= std::numeric_limits<int32_t>::max(), op, ": needs ", shape.blocks,
             " thread blocks, at most 2147483647 fit one launch; split the tokens");
}

#if defined(FIPS_HOST_EMULATION)

template <auto kKernel, class Task>
void launch(const char* op, const LaunchShape& shape, const Task& task, Stream) {
  check_launch(op, shape);
  emulation::run_grid(kKernel, shape.blocks, shape.threads, shape.shared_bytes, task);
}

template <auto kKernel, class Task>
void launch_together(const char* op, const LaunchShape& shape, const Task& task, Stream) {
  check_launch(op, shape);
  emulation::run_grid_together(kKernel, shape.blocks, shape.threads, shape.shared_bytes, task);
}

#else

// More than 48 KiB of shared memory needs a permission, once per kernel and device.
template <auto kKernel>
void allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // one bit per device
  int device = 0;
  FIPS_CUDA_CHECK(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) {
    return;
  }
  int limit = 0;
  FIPS_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  FIPS_CHECK(bytes <= limit, "CUDA: a kernel needs ", bytes,
             " bytes of shared memory, but this device allows ", limit);
  FIPS_CUDA_CHECK(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

// `op` names the op in errors. Only launches: no allocation, no synchronisation.
template <auto kKernel, class Task>
void launch(const char* op, const LaunchShape& shape, const Task& task, Stream stream) {
  if (shape.blocks == 0) {
    return;
  }
  check_launch(op, shape);
  if (shape.shared_bytes > 48 * 1024) {
    allow_shared_memory<kKernel>(shape.shared_bytes);
  }
  void* arguments[] = {const_cast<Task*>(&task)};
  const cudaError_t status =
      cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(shape.blocks)), dim3(shape.threads),
                       arguments, shape.shared_bytes, stream);
  FIPS_CHECK(status == cudaSuccess, op, ": launching ", shape.blocks, " blocks of ", shape.threads,
             " threads with ", shape.shared_bytes, " bytes of shared memory failed with ",
             cudaGetErrorName(status), " (", cudaGetErrorString(status), ")");
}

// The same for blocks that wait for each other: all of them run at once, or the launch fails. Also
// keeps two such kernels on different streams from each holding half of the device.
template <auto kKernel, class Task>
void launch_together(const char* op, const LaunchShape& shape, const Task& task, Stream stream) {
  if (shape.blocks == 0) {
    return;
  }
  check_launch(op, shape);
  if (shape.shared_bytes > 48 * 1024) {
    allow_shared_memory<kKernel>(shape.shared_bytes);
  }
  void* arguments[] = {const_cast<Task*>(&task)};
  const cudaError_t status = cudaLaunchCooperativeKernel(
      kKernel, dim3(static_cast<unsigned>(shape.blocks)), dim3(shape.threads), arguments,
      static_cast<size_t>(shape.shared_bytes), stream);
  FIPS_CHECK(status == cudaSuccess, op, ": launching ", shape.blocks, " blocks of ", shape.threads,
             " threads together, with ", shape.shared_bytes,
             " bytes of shared memory each, failed with ", cudaGetErrorName(status), " (",
             cudaGetErrorString(status), ")");
}

#endif

}  // namespace fips::cuda
