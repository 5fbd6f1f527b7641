#include "core/philox.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gaussian.h"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;  // a thread makes one pair of normals, about 200 instructions

template <class T>
struct GaussianTask {
  T* out;
  int64_t count;
  uint64_t seed;
};

template <class T>
FIPS_KERNEL(kThreads, 4)
gaussian_kernel(const GaussianTask<T> task) {
  const int64_t pair = block_index() * kThreads + thread_index();
  if (2 * pair >= task.count) {
    return;
  }
  const NormalPair normals = philox_normals(task.seed, static_cast<uint64_t>(pair));
  task.out[2 * pair] = static_cast<T>(normals.first);
  if (2 * pair + 1 < task.count) {
    task.out[2 * pair + 1] = static_cast<T>(normals.second);
  }
}

template <class T>
struct NoiseTask {
  const T* in;
  const T* scale;
  double* out;
  int64_t total, count;
  double noise;
  uint64_t seed;
};

template <class T>
FIPS_DEVICE double scaled_element(const NoiseTask<T>& task, int64_t i) {
  const double scale = task.scale[i / task.count];
  return scale == 0 ? 0.0 : task.in[i] / scale;
}

template <class T>
FIPS_KERNEL(kThreads, 4)
noise_kernel(const NoiseTask<T> task) {
  const int64_t pair = block_index() * kThreads + thread_index();
  if (2 * pair >= task.total) {
    return;
  }
  const NormalPair normals = philox_normals(task.seed, static_cast<uint64_t>(pair));
  task.out[2 * pair] = scaled_element(task, 2 * pair) + task.noise * normals.first;
  if (2 * pair + 1 < task.total) {
    task.out[2 * pair + 1] = scaled_element(task, 2 * pair + 1) + task.noise * normals.second;
  }
}

LaunchShape pairs_of(int64_t count) { return {ceil_div(ceil_div(count, 2), kThreads), kThreads}; }

template <class T>
void add_noise(const void* in, const void* scale, double* out, int64_t batch, int64_t count,
               double noise, uint64_t seed, Stream stream) {
  const NoiseTask<T> task{static_cast<const T*>(in),
                          static_cast<const T*>(scale),
                          out,
                          batch * count,
                          count,
                          noise,
                          seed};
  launch<noise_kernel<T>>("scaled_with_noise", pairs_of(task.total), task, stream);
}

}  // namespace

void gaussian(void* out, int64_t count, DType dtype, uint64_t seed, Stream stream) {
  if (dtype == DType::kFloat64) {
    launch<gaussian_kernel<double>>("gaussian", pairs_of(count),
                                    GaussianTask<double>{static_cast<double*>(out), count, seed},
                                    stream);
  } else {
    FIPS_CHECK(dtype == DType::kFloat32, "gaussian: dtype is ", dtype_name(dtype),
               "; samples are float32 or float64");
    launch<gaussian_kernel<float>>("gaussian", pairs_of(count),
                                   GaussianTask<float>{static_cast<float*>(out), count, seed},
                                   stream);
  }
}

void scaled_with_noise(const void* in, const void* scale, double* out, int64_t batch, int64_t count,
                       DType dtype, double noise, uint64_t seed, Stream stream) {
  FIPS_CHECK(dtype == DType::kFloat64 || dtype == DType::kFloat32, "scaled_with_noise: dtype is ",
             dtype_name(dtype), "; expected float32 or float64");
  (dtype == DType::kFloat64 ? add_noise<double> : add_noise<float>)(in, scale, out, batch, count,
                                                                    noise, seed, stream);
}

}  // namespace fips::cuda
