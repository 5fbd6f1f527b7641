// What one launch of Hopper's block_sparse_mm works on, with the direction resolved as in
// block_sparse_mm_task.h.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/cuda/tensor_map.h"

namespace fips::cuda {

// One slice: its stored blocks as a tensor [num_blocks * bn, bk], and the index that says which of
// them feed an output block.
struct Sm90Product {
  TensorMap values;
  const int32_t* range;         // [out_blocks + 1], first index entry of each output block
  const int32_t* reduce_index;  // [num_blocks], block along the reduction
  const int32_t* block_id;      // [num_blocks] or null, when entry p is stored block p
  const void* bias;             // [out_features] or null
  int num_blocks;
};

struct Sm90Task {
  TensorMap x;             // [tokens, in_features]
  TensorMap out;           // [tokens, out_features]
  Sm90Product product[2];  // {v}, or {gate, v}: out = act(x gate + bias) * (x v + bias)
  Activation activation;
  int token_tiles, out_blocks, reduce_blocks;
  int tiles;  // token_tiles * out_blocks
  int grid;   // thread blocks; each takes every grid-th tile
  int in_features, out_features;
  int reduce_shift;  // log2 of the block edge along the reduction
  int n_edge;        // bn: rows of a stored block
};

}  // namespace fips::cuda
