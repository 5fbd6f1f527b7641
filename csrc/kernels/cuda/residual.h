// Residuals of the reconstruction loss on a GPU (kernels/reduce.h has the CPU's).
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

struct ResidualParams {
  DType dtype = DType::kFloat32;
  void* y = nullptr;  // [rows, cols] contiguous; becomes weight[row] * (y - target)
  const void* target = nullptr;
  const float* weight = nullptr;  // [rows], or null for all ones
  int64_t rows = 0, cols = 0;
  double* row_sums = nullptr;  // [rows] workspace
  double* loss = nullptr;      // += sum of weight[row] * (y - target)^2
};

// Deterministic: one sum a row, added up in a fixed order.
void weighted_residual(const ResidualParams& params, Stream stream);

// result = scale * loss, both one number in device memory
void scale_loss(float* result, const double* loss, double scale, Stream stream);

}  // namespace fips::cuda
