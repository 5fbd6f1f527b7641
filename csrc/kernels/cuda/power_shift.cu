#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/power_shift.h"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;
// Of one block: enough that reading the factor's diagonal, a sector per entry, is the lesser part.
constexpr int64_t kElements = 64 * kThreads;

struct Smallest {
  FIPS_DEVICE_MEMBER double operator()(double a, double b) const { return b < a ? b : a; }
};

template <class T>
FIPS_KERNEL(kThreads, 4)
power_shift_kernel(const PowerShiftParams p) {
  const int64_t count = p.rows * p.width, blocks = ceil_div(count, kElements);
  const int64_t matrix = block_index() / blocks;
  const double* const factor = p.factor + matrix * p.width * p.width;
  double least = factor[0];
  for (int64_t i = thread_index(); i < p.width; i += kThreads) {
    least = Smallest{}(least, factor[i * (p.width + 1)]);
  }
  least =
      block_reduce<kThreads>(reinterpret_cast<double*>(dynamic_shared_memory()), least, Smallest{});
  const double shift =
      0.5 * static_cast<double>(static_cast<const T*>(p.scale)[matrix]) * least * least;
  const int64_t first = block_index() % blocks * kElements;
  T* const y = static_cast<T*>(p.y) + matrix * count;
  const double* const basis = p.basis + matrix * count;
  for (int64_t i = first + thread_index(); i < min_of(count, first + kElements); i += kThreads) {
    y[i] -= static_cast<T>(shift * basis[i]);
  }
}

}  // namespace

void subtract_power_shift(const PowerShiftParams& params, Stream stream) {
  FIPS_CHECK(params.dtype == DType::kFloat64 || params.dtype == DType::kFloat32,
             "subtract_power_shift: dtype is ", dtype_name(params.dtype),
             "; expected float32 or float64");
  const LaunchShape shape{params.batch * ceil_div(params.rows * params.width, kElements), kThreads,
                          kThreads * int{sizeof(double)}};
  if (params.dtype == DType::kFloat64) {
    launch<power_shift_kernel<double>>("subtract_power_shift", shape, params, stream);
  } else {
    launch<power_shift_kernel<float>>("subtract_power_shift", shape, params, stream);
  }
}

}  // namespace fips::cuda
