// Before the sweeps: each matrix scaled into a safe range and copied into padded rows, next to an
// identity that becomes the left factor.
#pragma once

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/jacobi_math.cuh"
#include "kernels/cuda/jacobi_task.h"

namespace fips::cuda {

inline constexpr int kJacobiLoadThreads = 256;

// The largest magnitude decides the scale, so that squares neither overflow nor vanish. Rows are
// zero up to rounding when their norm is below that of a unit error in every entry of an average
// row: rotating them would only reorder noise, and takes many sweeps.
template <class T>
FIPS_KERNEL(kJacobiLoadThreads, 2)
jacobi_load_kernel(const JacobiTask<T> task) {
  constexpr int kThreads = kJacobiLoadThreads;
  constexpr double kEpsilon = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
  double* const scratch = reinterpret_cast<double*>(dynamic_shared_memory());
  const JacobiPlan& plan = task.plan;
  const int64_t count = static_cast<int64_t>(task.vectors) * task.length;
  const T* const matrix = task.matrices + block_index() * count;
  double largest = 0;
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    largest = Largest{}(largest, static_cast<double>(magnitude(matrix[i])));
  }
  const double scale = power_of_two_near<T>(block_reduce<kThreads>(scratch, largest, Largest{}));
  const T inverse = static_cast<T>(1 / scale);

  T* const rows = task.rows + block_index() * task.vectors * plan.stride;
  double squares = 0;
  for (int i = thread_index(); i < task.vectors * plan.stride; i += kThreads) {
    const int row = i / plan.stride, column = i % plan.stride;
    T value = static_cast<T>(column == plan.padded_length + row);
    if (column < plan.padded_length) {
      value = column < task.length
                  ? matrix[static_cast<int64_t>(row) * task.length + column] * inverse
                  : T(0);
      squares += static_cast<double>(value) * static_cast<double>(value);
    }
    rows[i] = value;
  }
  squares = block_reduce<kThreads>(scratch, squares, Sum{});
  for (int i = thread_index(); i < plan.sweeps; i += kThreads) {
    task.rotated[block_index() * plan.sweeps + i] = 0;
  }
  if (thread_index() == 0) {
    task.states[block_index()] = {scale, 4 * kEpsilon * kEpsilon * squares / task.vectors};
  }
}

}  // namespace fips::cuda
