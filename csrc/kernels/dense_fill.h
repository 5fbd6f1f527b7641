// Between a slice and its zero-filled transpose: the fall-back that lets a vendor GEMM do the
// product.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"

namespace fips::cpu {

// Writes V^T, zero-filled, as [cols, rows] contiguous in v.dtype (k contiguous, as in the stored
// blocks).
void fill_dense_transposed(const BlockSparseView& v, void* out, const Parallel& parallel);

// values_out (laid out like v.values, accumulator type) = or += the stored slots of `dense`, a
// contiguous [cols, rows] matrix of element type `dense_dtype`.
void gather_stored(const BlockSparseView& v, const void* dense, DType dense_dtype, void* out,
                   bool accumulate, const Parallel& parallel);

}  // namespace fips::cpu
