// Small sums around the products on a GPU (kernels/reduce.h has the CPU's). All are deterministic
// and add in float32, for float32, bfloat16 and float16.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// sums[i] += values[i]
void add_into(float* sums, const void* values, DType dtype, int64_t count, Stream stream);
void add_into(double* sums, const double* values, int64_t count, Stream stream);

// out[i] = scale * sums[i], rounded to `dtype`
void scale_into(void* out, const float* sums, double scale, DType dtype, int64_t count,
                Stream stream);

struct ColumnSumParams {
  const void* matrix = nullptr;  // [rows, cols] contiguous
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0;
  float* sums = nullptr;  // [cols]
};

int64_t add_column_sums_workspace(const ColumnSumParams& params);

// sums[c] += sum over rows of matrix[row][c]
void add_column_sums(const ColumnSumParams& params, void* workspace, Stream stream);

}  // namespace fips::cuda
