// What the Jacobi kernels take: one argument by value.
#pragma once

#include <cstdint>

#include "kernels/cuda/jacobi_plan.h"

namespace fips::cuda {

// Per matrix, in the workspace.
struct alignas(16) JacobiState {
  double scale;        // the power of two that the rows were divided by
  double null_square;  // rows of this squared norm or less are rounding errors: zero
};

template <class T>
struct JacobiTask {
  const T* matrices;
  T* left;
  T* values;
  T* right;
  T* rows;  // [batch, vectors, plan.stride]: a row of the matrix, then one of the left factor
  JacobiState* states;  // [batch]
  int32_t* rotated;     // [batch, sweeps]: whether the sweep changed the matrix
  int vectors, length;
  T tolerance;  // rows are orthogonal when |cos| of their angle is no larger
  JacobiPlan plan;
  int sweep, round;  // of this launch, where the matrix is not resident
};

}  // namespace fips::cuda
