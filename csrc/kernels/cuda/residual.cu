#include "kernels/cuda/common.cuh"
#include "kernels/cuda/element_type.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/residual.h"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(double));

// The sum over the block's threads, in every thread, by a tree of fixed shape.
FIPS_DEVICE double block_sum(double value) {
  double* shared = reinterpret_cast<double*>(dynamic_shared_memory());
  shared[thread_index()] = value;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    block_barrier();
    if (thread_index() < step) {
      shared[thread_index()] += shared[thread_index() + step];
    }
  }
  block_barrier();
  return shared[0];
}

// One row a block.
template <class T>
FIPS_KERNEL(kThreads, 4)
residual_rows(const ResidualParams task) {
  const int64_t row = block_index();
  T* y = static_cast<T*>(task.y) + row * task.cols;
  const T* target = static_cast<const T*>(task.target) + row * task.cols;
  const float weight = task.weight == nullptr ? 1.0f : task.weight[row];
  double sum = 0;
  for (int64_t i = thread_index(); i < task.cols; i += kThreads) {
    const float difference = to_float(y[i]) - to_float(target[i]);
    sum += static_cast<double>(difference) * difference;
    y[i] = from_float<T>(weight * difference);
  }
  sum = block_sum(sum);
  if (thread_index() == 0) {
    task.row_sums[row] = weight * sum;
  }
}

FIPS_KERNEL(kThreads, 1)
add_row_sums(const ResidualParams task) {
  double sum = 0;
  for (int64_t row = thread_index(); row < task.rows; row += kThreads) {
    sum += task.row_sums[row];
  }
  sum = block_sum(sum);
  if (thread_index() == 0) {
    *task.loss += sum;
  }
}

struct ScaleLossTask {
  float* result;
  const double* loss;
  double scale;
};

FIPS_KERNEL(kWarpSize, 1)
scale_loss_kernel(const ScaleLossTask task) {
  if (thread_index() == 0) {
    *task.result = static_cast<float>(task.scale * *task.loss);
  }
}

}  // namespace

void scale_loss(float* result, const double* loss, double scale, Stream stream) {
  launch<scale_loss_kernel>("reconstruction_loss", {1, kWarpSize},
                            ScaleLossTask{result, loss, scale}, stream);
}

void weighted_residual(const ResidualParams& params, Stream stream) {
  if (params.rows == 0) {
    return;
  }
  with_element_type("reconstruction_loss", params.dtype, [&](auto element) {
    launch<residual_rows<decltype(element)>>("reconstruction_loss",
                                             {params.rows, kThreads, kSharedBytes}, params, stream);
  });
  launch<add_row_sums>("reconstruction_loss", {1, kThreads, kSharedBytes}, params, stream);
}

}  // namespace fips::cuda
