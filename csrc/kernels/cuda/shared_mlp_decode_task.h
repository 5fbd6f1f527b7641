// What one launch of shared_mlp_decode works on: four stages, each one or two products of a few
// tokens with a matrix, dense or a slice. Plain data, passed to the kernel by value.
#pragma once

#include <cstdint>

#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/shared_mlp_decode_layout.h"
#include "kernels/shared_mlp.h"

namespace fips::cuda {

inline constexpr int kDecodeStages = 4;  // z, h, w, y
inline constexpr int kHiddenStage = 1;
inline constexpr int kDecodeMatrices = 5;

// Words in the workspace by which the blocks of a grid tell each other where they are, [blocks]
// each: one row for every barrier between stages and for the shares of every stage.
inline constexpr int kDecodeBarriers = kDecodeStages - 1;
inline constexpr int kDecodeFlagRows = kDecodeBarriers + kDecodeStages;

// Seen from the product: outputs and positions of the reduction instead of rows and columns.
struct DecodeMatrix {
  const void* values;
  int in_features, out_features;
  int row_stride;  // of a dense matrix, in elements
  bool columns;    // outputs, not the reduction, are contiguous
  bool wide;       // 16-byte accesses are aligned

  const int32_t* range;         // null: dense; else as in block_sparse_mm_task.h
  const int32_t* reduce_index;  // ditto
  const int32_t* block_id;      // ditto
  int num_blocks, reduce_blocks, slots;
  int out_shift, reduce_shift, k_shift;  // log2 of the block edges

  BitmapSlice bitmap;  // mask null: dense, or `block` encoding
  bool wide_mask;      // 16-byte accesses are aligned
  Storage storage;
  const Half* scales;  // of codes, [num_blocks][rows of a block]

  // Steps are made when they are used, instead of copied (shared_mlp_decode_expand.cuh).
  FIPS_HOST_DEVICE bool expands() const {
    return bitmap.mask != nullptr || storage != Storage::kPlain;
  }
};

// Features [tokens, count] that a stage reads and the one before it writes.
struct DecodeFeatures {
  void* data;
  int64_t stride;
  int count;
  bool wide;
};

struct DecodeTask {
  DecodeMatrix matrix[kDecodeMatrices];        // U, up, gate, down, U_out; see matrix_of
  DecodeFeatures features[kDecodeStages + 1];  // x, z, h, w, y
  const void *up_bias, *gate_bias, *down_bias;
  Activation activation;
  int tokens, width, rank, rank_out;
  bool gated, identity, bitmap;  // bitmap: of any slice

  StageSplit split[kDecodeStages];
  float* partial;      // [blocks][partial_floats]: sums of shares
  int partial_floats;  // of one unit, [matrix][token][out_tile]
  uint64_t* flags;     // [kDecodeFlagRows][blocks], any content
  uint64_t nonce;      // never the same in two calls
  int blocks;          // grid size
  int slots;           // of each warp's ring in shared memory, 2 to 5
};

FIPS_INLINE FIPS_HOST_DEVICE int matrices_of(const DecodeTask& task, int stage) {
  return stage == kHiddenStage && task.gated ? 2 : 1;
}

// Matrix `which` (1: the gate) of a stage, as an index into DecodeTask::matrix.
FIPS_INLINE FIPS_HOST_DEVICE int matrix_of(int stage, int which) {
  return stage <= kHiddenStage ? stage + which : stage + 1;
}

// Throws for arguments that cannot be run. Pointers into the workspace, nonce and slots are unset.
DecodeTask make_decode_task(const SharedMlpParams& params, int sm_count);

// Where flags, z, h, w and partial sums lie in the workspace, in bytes.
struct DecodeWorkspace {
  int64_t features_at[kDecodeStages + 1];  // the first and last unused
  int64_t partial_at;
  int64_t bytes;
};
DecodeWorkspace plan_workspace(const DecodeTask& task, int64_t element_bytes);
void bind_workspace(DecodeTask& task, void* workspace, int64_t element_bytes);

}  // namespace fips::cuda
