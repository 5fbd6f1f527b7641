// Sampled dense-dense product: values_out = (a^T * b) on the stored slots of V, with a [tokens, r]
// and b [tokens, n]. It is the gradient of x * V with respect to the stored values.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"

namespace fips {

struct BlockSparseSddmmParams {
  BlockSparseView v;  // v.values is not read; v.dtype is the element type of a and b
  const void* a = nullptr;
  int64_t a_stride = 0;
  const void* b = nullptr;
  int64_t b_stride = 0;
  int64_t tokens = 0;
  // Laid out like v.values, in the accumulator type: float, or double when v.dtype is float64.
  void* out = nullptr;
  bool accumulate = false;  // out += instead of out =
};

namespace cpu {

// Deterministic: every output is one sum in token order, whatever the number of threads.
void block_sparse_sddmm(const BlockSparseSddmmParams& params, const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
