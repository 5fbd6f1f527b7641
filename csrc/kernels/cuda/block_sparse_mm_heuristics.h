// Which tile block_sparse_mm runs on a GPU: a pure function of the call, so that it can be tested
// and read.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/types.h"
#include "kernels/cuda/tuning_table.h"

namespace fips::cuda {

struct MmTileQuery {
  int64_t tokens;
  int64_t out_blocks;
  DType dtype;
  bool bitmap;
  int sm_count;
  double tiles_per_sm = kTuning[0].tiles_per_sm;
};

// The tallest token tile each kernel is built for: float32 keeps its sums in registers of scalar
// FMAs, and expanding a bitmap limits the speed of a tall tile anyway.
inline int largest_token_tile(DType dtype, bool bitmap) {
  return dtype == DType::kFloat32 || bitmap ? 64 : 128;
}

// Tokens per block: 16, 64 or 128. A tall tile reads the slice fewer times; a low one wastes less
// on few tokens and cuts the work into enough blocks to fill the chip.
inline int choose_token_tile(const MmTileQuery& query) {
  for (int tile = largest_token_tile(query.dtype, query.bitmap); tile > 16;
       tile = tile == 128 ? 64 : 16) {
    const bool mostly_filled = query.tokens > tile / 2;
    const int64_t tiles = ceil_div(query.tokens, tile) * query.out_blocks;
    const bool fills_chip = static_cast<double>(tiles) >= query.tiles_per_sm * query.sm_count;
    if (mostly_filled && fills_chip) {
      return tile;
    }
  }
  // Below this, more and smaller blocks only read the slice more often.
  return query.tokens <= 64 ? 16 : 64;
}

}  // namespace fips::cuda
