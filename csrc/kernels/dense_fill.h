// Between a slice and its zero-filled transpose: the fall-back that lets a vendor GEMM do the
// product.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"

namespace fips {

struct GatherParams {
  BlockSparseView v;            // v.values is not read
  const void* dense = nullptr;  // [cols, rows] contiguous
  DType dense_dtype = DType::kFloat32;
  void* out = nullptr;  // laid out like v.values, in the accumulator type of dense_dtype
  bool accumulate = false;
};

namespace cpu {

// Writes V^T, zero-filled, as [cols, rows] contiguous in v.dtype (k contiguous, as in the stored
// blocks).
void fill_dense_transposed(const BlockSparseView& v, void* out, const Parallel& parallel);

// out = (or, accumulating, +=) the stored slots of a dense matrix; slots in the padding read as
// zero.
void gather_stored(const GatherParams& params, const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
