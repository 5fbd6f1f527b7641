// What one launch of block_sparse_mm works on, with the direction resolved: "out" and "reduce"
// instead of rows and columns. Plain data, passed to the kernel by value.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/bitmap_slice.h"

namespace fips::cuda {

struct MmTask {
  const void* x;          // [tokens, in_features], rows x_stride apart
  const void* bias;       // [out_features] or null
  void* out;              // [tokens, out_features], rows out_stride apart
  const void* gate;       // null, or pre-activations like out: out = act(gate) * (sum + bias)
  Activation activation;  // without a gate: out = act(sum + bias)
  int64_t tokens, x_stride, out_stride;
  int in_features, out_features;

  const int32_t* range;         // [out_blocks + 1], first index entry of each output block
  const int32_t* reduce_index;  // [num_blocks], block along the reduction
  const int32_t* block_id;      // [num_blocks] or null, when entry p is stored block p
  int out_blocks, reduce_blocks, num_blocks;
  int reduce_shift;  // log2 of the block edge along the reduction
  int k_shift;       // log2 of bk, the contiguous edge of a stored block

  const void* values;  // `block`: [num_blocks, bn, bk]
  int slots;           // per stored block
  BitmapSlice bitmap;  // `bitmap`

  bool wide_x, wide_values, wide_out;  // 16-byte accesses are aligned
};

inline MmTask make_task(const BlockSparseMmParams& params) {
  const BlockSparseView& v = params.v;
  const bool transpose = params.transpose;
  const int64_t element = element_size(v.dtype);
  FIPS_CHECK(v.rows <= kMaxInFeatures && v.cols <= kMaxInFeatures && v.num_blocks <= kMaxInFeatures,
             "block_sparse_mm: a slice of ", v.rows, "x", v.cols, " with ", v.num_blocks,
             " stored blocks is too large for CUDA; rows, columns and blocks may be ",
             kMaxInFeatures, " at most");
  MmTask task{};
  task.x = params.x;
  task.bias = params.bias;
  task.out = params.out;
  task.tokens = params.tokens;
  task.in_features = static_cast<int>(params.in_features());
  task.out_features = static_cast<int>(params.out_features());
  task.x_stride = params.x_stride;
  task.out_stride = params.out_stride;
  task.range = transpose ? v.row_ptr : v.col_ptr;
  task.reduce_index = transpose ? v.col_idx : v.row_idx;
  task.block_id = transpose ? v.block_id : nullptr;
  task.out_blocks = static_cast<int>(transpose ? v.block_rows() : v.block_cols());
  task.reduce_blocks = static_cast<int>(transpose ? v.block_cols() : v.block_rows());
  task.num_blocks = static_cast<int>(v.num_blocks);
  task.reduce_shift = log2_of_edge(transpose ? v.bn : v.bk);
  task.k_shift = log2_of_edge(v.bk);
  task.values = v.values;
  task.slots = static_cast<int>(v.slots());
  task.bitmap = make_bitmap(v);
  task.wide_x = is_aligned(params.x, 16) && params.x_stride * element % 16 == 0;
  task.wide_values = is_aligned(v.values, 16);
  task.wide_out = is_aligned(params.out, 16) && params.out_stride * element % 16 == 0;
  return task;
}

}  // namespace fips::cuda
