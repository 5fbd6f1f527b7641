// The shift of a power iteration.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

struct PowerShiftParams {
  int64_t batch = 0, rows = 0, width = 0;
  DType dtype = DType::kFloat32;       // of y and scale: float32 or float64
  void* y = nullptr;                   // [batch, rows, width]
  const double* basis = nullptr;       // [batch, rows, width]
  const double* eigenvalue = nullptr;  // [batch]
  const void* scale = nullptr;         // [batch]
};

// y -= 0.5 * eigenvalue * scale * basis, matrix by matrix.
void subtract_power_shift(const PowerShiftParams& params, Stream stream);

}  // namespace fips::cuda
