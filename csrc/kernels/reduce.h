// Small sums around the products: gradient accumulation in the accumulator type (float, or double
// for float64) and the residual of the reconstruction loss. All are deterministic for any number of
// threads.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace fips::cpu {

// sums[i] += values[i]
void add_into(void* sums, const void* values, DType dtype, int64_t count, const Parallel& parallel);

// sums[c] += sum over rows of matrix[row][c]; the matrix is contiguous.
void add_column_sums(void* sums, const void* matrix, DType dtype, int64_t rows, int64_t cols,
                     const Parallel& parallel);

// out[i] = scale * sums[i], rounded to `dtype`
void scale_into(void* out, const void* sums, double scale, DType dtype, int64_t count,
                const Parallel& parallel);

// Residuals of [rows, cols] outputs: y = weight[row] * (y - target); returns the sum of weight[row]
// * (y - target)^2, so that y becomes half the gradient of that sum. `weight` is float32, or null
// for all ones.
double weighted_residual(void* y, const void* target, const float* weight, DType dtype,
                         int64_t rows, int64_t cols, const Parallel& parallel);

}  // namespace fips::cpu
