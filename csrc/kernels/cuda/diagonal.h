// What lifts a singular Gram matrix.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Adds max(relative * mean of the diagonal, minimum) to the diagonal of each of `matrices`
// [batch, width, width], and writes what it added to `added` [batch] (may be null). `dtype`:
// float32 or float64.
void add_to_diagonal(void* matrices, int64_t batch, int64_t width, DType dtype, double relative,
                     double minimum, double* added, Stream stream);

}  // namespace fips::cuda
