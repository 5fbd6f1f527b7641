#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/power_shift.h"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
FIPS_KERNEL(kThreads, 4)
power_shift_kernel(const PowerShiftParams p) {
  const int64_t i = block_index() * kThreads + thread_index(), count = p.rows * p.width;
  if (i < p.batch * count) {
    const int64_t matrix = i / count;
    const double shift = 0.5 * p.eigenvalue[matrix] * static_cast<const T*>(p.scale)[matrix];
    static_cast<T*>(p.y)[i] -= static_cast<T>(shift * p.basis[i]);
  }
}

}  // namespace

void subtract_power_shift(const PowerShiftParams& params, Stream stream) {
  FIPS_CHECK(params.dtype == DType::kFloat64 || params.dtype == DType::kFloat32,
             "subtract_power_shift: dtype is ", dtype_name(params.dtype),
             "; expected float32 or float64");
  const LaunchShape shape{ceil_div(params.batch * params.rows * params.width, kThreads), kThreads};
  if (params.dtype == DType::kFloat64) {
    launch<power_shift_kernel<double>>("subtract_power_shift", shape, params, stream);
  } else {
    launch<power_shift_kernel<float>>("subtract_power_shift", shape, params, stream);
  }
}

}  // namespace fips::cuda
