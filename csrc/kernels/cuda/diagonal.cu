#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/diagonal.h"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct DiagonalTask {
  T* matrices;
  int64_t width;
  double relative, minimum;
  double* added;
};

template <class T>
FIPS_KERNEL(kThreads, 1)
diagonal_kernel(const DiagonalTask<T> task) {
  T* const matrix = task.matrices + block_index() * task.width * task.width;
  double trace = 0;
  for (int64_t i = thread_index(); i < task.width; i += kThreads) {
    trace += matrix[i * (task.width + 1)];
  }
  trace = block_reduce<kThreads>(reinterpret_cast<double*>(dynamic_shared_memory()), trace, Sum{});
  const double share = task.relative * trace / static_cast<double>(task.width);
  const double shift = share < task.minimum ? task.minimum : share;
  for (int64_t i = thread_index(); i < task.width; i += kThreads) {
    matrix[i * (task.width + 1)] += static_cast<T>(shift);
  }
  if (thread_index() == 0 && task.added != nullptr) {
    task.added[block_index()] = shift;
  }
}

template <class T>
void lift(void* matrices, int64_t batch, int64_t width, double relative, double minimum,
          double* added, Stream stream) {
  const LaunchShape shape{width == 0 ? 0 : batch, kThreads, kThreads * int{sizeof(double)}};
  launch<diagonal_kernel<T>>(
      "add_to_diagonal", shape,
      DiagonalTask<T>{static_cast<T*>(matrices), width, relative, minimum, added}, stream);
}

}  // namespace

void add_to_diagonal(void* matrices, int64_t batch, int64_t width, DType dtype, double relative,
                     double minimum, double* added, Stream stream) {
  FIPS_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "add_to_diagonal: dtype is ",
             dtype_name(dtype), "; expected float32 or float64");
  (dtype == DType::kFloat64 ? lift<double> : lift<float>)(matrices, batch, width, relative, minimum,
                                                          added, stream);
}

}  // namespace fips::cuda
