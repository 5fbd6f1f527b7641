// When block_sparse_mm takes Hopper's kernels and which tile they run: pure functions of the call.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/device_info.h"

namespace fips::cuda {

// Tokens of one tile. Tall is what registers hold: a warpgroup of 128 threads sums 64 features x
// 256 tokens in 128 registers a thread; with a gate two sums of 192 tokens in 192.
inline constexpr int kSm90LowTile = 128;
inline constexpr int sm90_tall_tile(int out_edge, bool gated) {
  return gated && out_edge == 128 ? 192 : 256;
}

// From here on a tile of 128 tokens is more than half full.
inline constexpr int64_t kSm90MinTokens = 65;

struct Sm90TileQuery {
  int64_t tokens;
  int64_t out_blocks;
  int out_edge;
  bool gated;
  int sm_count;
};

// A tile's time is taken for the bytes it moves from L2 per reduction step, out_edge rows of
// weights and `tile` rows of x, which is what limits these kernels (990 TFLOP/s on 128 x 256 x 64
// would read 11.4 TB/s), times the waves of tiles.
inline int choose_sm90_token_tile(const Sm90TileQuery& query) {
  const auto cost = [&](int tile) {
    const int64_t tiles = ceil_div(query.tokens, tile) * query.out_blocks;
    return ceil_div(tiles, query.sm_count) * (tile + query.out_edge);
  };
  const int tall = sm90_tall_tile(query.out_edge, query.gated);
  return cost(kSm90LowTile) < cost(tall) ? kSm90LowTile : tall;
}

// Whether the kernels run this product: bfloat16 or float16 in `block` encoding with edges of 64 or
// 128, more than 64 tokens, and tensors as the copy engine takes them (16-byte alignment of
// addresses and strides). A gate must have the same grid. Looks at no index.
bool sm90_supports(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const DeviceInfo& device);

}  // namespace fips::cuda
