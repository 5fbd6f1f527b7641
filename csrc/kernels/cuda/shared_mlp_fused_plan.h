// What one launch of shared_mlp_fused works on and how it uses shared memory: plain host code.
#pragma once

#include <optional>

#include "kernels/cuda/device_info.h"
#include "kernels/cuda/indexing.h"
#include "kernels/shared_mlp.h"

namespace fips::cuda {

inline constexpr int kFusedStrip = 16;
inline constexpr int kFusedUnitTokens = 64;

// Warps, and pieces of w (a strip for kFusedUnitTokens tokens) whose sums one warp keeps in
// registers. Twelve warps divide the strips of common widths evenly; with a gate there are two sums
// beside the kept ones, which takes the registers of a third of the warps.
constexpr int fused_warps(bool gated) { return gated ? 8 : 12; }
constexpr int fused_kept_units(bool gated) { return gated ? 3 : 2; }

// Two regions of shared memory, each used twice: x, then a chunk of h; z, then w.
struct FusedPlan {
  int token_tile;  // 64 or 128
  int chunk;       // hidden features held at once, a multiple of the block's edge
  int z_features;  // the rank, padded to whole blocks
  int x_stride, h_stride, z_stride, w_stride;  // bytes between tokens
  int second_region;                           // offset of z and w
  int shared_bytes;
};

// TokenTile::stride_of for 16-bit elements.
inline int64_t fused_stride(int64_t features) { return round_up(2 * features, 128) + 32; }

inline std::optional<FusedPlan> plan_fused_tile(const SharedMlpParams& p, int token_tile,
                                                int max_shared_bytes) {
  const int64_t units = p.rank_out / kFusedStrip * (token_tile / kFusedUnitTokens);
  const int64_t x_stride = fused_stride(p.width), w_stride = fused_stride(p.rank_out);
  // Whole blocks of both slices: the padding of z multiplies that of V.
  const int64_t up_rows = p.up.block_rows() * p.up.bk;
  const int64_t z_features =
      p.gate == nullptr ? up_rows : max_of(up_rows, p.gate->block_rows() * p.gate->bk);
  const int64_t z_stride = fused_stride(z_features);
  const int64_t second = max_of(z_stride, w_stride) * token_tile;
  const int64_t left = (max_shared_bytes - second) / token_tile;  // bytes of a token's x or h
  const bool gated = p.gate != nullptr;
  if (units > fused_warps(gated) * fused_kept_units(gated) || left < x_stride) {
    return std::nullopt;
  }
  int64_t chunk = round_up(p.hidden(), p.up.bn);
  while (chunk > 0 && fused_stride(chunk) > left) {
    chunk -= p.up.bn;
  }
  // Chunks of equal size.
  const int64_t chunks = chunk == 0 ? 0 : ceil_div(p.hidden(), chunk);
  if (chunks == 0) {
    return std::nullopt;
  }
  chunk = round_up(ceil_div(p.hidden(), chunks), p.up.bn);
  const int64_t h_stride = fused_stride(chunk);
  const int64_t first = max_of(x_stride, h_stride) * token_tile;
  return FusedPlan{token_tile,
                   static_cast<int>(chunk),
                   static_cast<int>(z_features),
                   static_cast<int>(x_stride),
                   static_cast<int>(h_stride),
                   static_cast<int>(z_stride),
                   static_cast<int>(w_stride),
                   static_cast<int>(first),
                   static_cast<int>(first + second)};
}

// The largest tile of tokens that fits: every weight is read once a tile. Null: the MLP is too
// wide.
inline std::optional<FusedPlan> plan_fused(const SharedMlpParams& p, const DeviceInfo& device) {
  for (const int token_tile : {128, 64}) {
    if (token_tile == 128 && ceil_div(p.tokens, token_tile) < device.sm_count) {
      continue;
    }
    if (const auto plan = plan_fused_tile(p, token_tile, device.max_shared_bytes)) {
      return plan;
    }
  }
  return std::nullopt;
}

struct FusedTask {
  SharedMlpParams p;  // p.gate is not read
  BlockSparseView gate;
  FusedPlan plan;
};

}  // namespace fips::cuda
