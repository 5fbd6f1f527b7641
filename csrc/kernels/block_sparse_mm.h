// out = x * V + bias ([tokens, r] -> [tokens, n]), or with `transpose` out = x * V^T + bias
// ([tokens, n] -> [tokens, r]). Torch-free: raw pointers, sizes, strides.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"
#include "kernels/activation.h"

namespace fips {

struct BlockSparseMmParams {
  BlockSparseView v;  // v.dtype is the element type of x, bias and out as well
  bool transpose = false;
  const void* x = nullptr;
  int64_t tokens = 0;
  int64_t x_stride = 0;  // elements between tokens; features are contiguous
  const void* bias = nullptr;
  void* out = nullptr;
  int64_t out_stride = 0;
  bool allow_tf32 = false;  // float32 on a GPU: multiply with 10 bits of mantissa

  FIPS_HOST_DEVICE int64_t in_features() const { return transpose ? v.cols : v.rows; }
  FIPS_HOST_DEVICE int64_t out_features() const { return transpose ? v.rows : v.cols; }
};

// What is stored in place of y = x * V + bias: act(y), or for a gated MLP act(x * gate + gate_bias)
// * y. Not with `transpose`.
struct MmEpilogue {
  Activation activation = Activation::kIdentity;
  const BlockSparseView* gate = nullptr;  // same shape, block and encoding as v
  const void* gate_bias = nullptr;
};

namespace cpu {

// Bytes of scratch memory that block_sparse_mm needs for the same arguments (any content); may be
// 0.
int64_t block_sparse_mm_workspace(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                                  const Parallel& parallel);

// Memory-safe for any contents of the index, masks and values, provided that the views have the
// lengths that check_sizes asks for: entries that point outside are skipped, and then the result is
// false and the output meaningless. check_view tells what is wrong.
bool block_sparse_mm(const BlockSparseMmParams& params, const MmEpilogue& epilogue, void* workspace,
                     const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
