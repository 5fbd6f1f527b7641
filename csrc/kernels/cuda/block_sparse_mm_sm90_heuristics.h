// Which of Hopper's kernels runs a block_sparse_mm, and its tile: pure functions of the call.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "kernels/cuda/block_sparse_mm_sm90_resident_config.h"

namespace fips::cuda {

// From here on a tile of 128 tokens is more than half full.
inline constexpr int64_t kSm90MinTokens = 65;

// Tokens of one tile of the kernel that streams both operands. Tall is what registers hold: a
// warpgroup of 128 threads sums 64 features x 256 tokens in 128 registers a thread; with a gate two
// sums of 192 tokens in 192.
inline constexpr int kSm90LowTile = 128;
inline constexpr int sm90_tall_tile(int out_edge, bool gated) {
  return gated && out_edge == 128 ? 192 : 256;
}

struct Sm90Query {
  int64_t tokens;
  int64_t in_features;  // whole blocks of them
  int64_t out_blocks;
  int64_t steps;  // of 64 reduction positions, over all output blocks and both products of a gate
  int out_edge;
  bool transposed, gated;
  int sm_count;
};

struct Sm90Plan {
  bool resident;  // x stays in shared memory, only weights are streamed
  int tokens;     // of one tile; resident: 96, 128, and without a gate 192 and 256 (with one, 192
                  // would spill)
};

// Bytes that the busiest multiprocessor moves from L2 to shared memory, which is what limits these
// kernels: 132 of them at the tensor cores' speed would read 11 TB/s for tiles of 128 x 256. Both
// kernels move 128 bytes per row of 64 reduction positions.

inline double sm90_stream_bytes(const Sm90Query& query, int tile) {
  const int64_t tiles = ceil_div(query.tokens, tile) * query.out_blocks;
  const double steps = static_cast<double>(query.steps) / static_cast<double>(query.out_blocks);
  return static_cast<double>(ceil_div(tiles, query.sm_count)) * steps * (tile + query.out_edge) *
         128;
}

inline double sm90_resident_bytes(const Sm90Query& query, int tile) {
  const int64_t units = query.out_blocks * (query.out_edge / 64);
  const int64_t items = ceil_div(ceil_div(query.tokens, tile) * units, query.sm_count);
  const double steps = static_cast<double>(query.steps) / static_cast<double>(query.out_blocks);
  const int64_t loads = 1 + (items - 1) / units;
  const int64_t panels = ceil_div(query.in_features, kSm90Reduce);
  return (static_cast<double>(items) * steps * 64 + static_cast<double>(loads * panels) * tile) *
         128;
}

inline bool sm90_plan_exists(const Sm90Query& query, const Sm90Plan& plan) {
  if (!plan.resident) {
    return plan.tokens == kSm90LowTile ||
           plan.tokens == sm90_tall_tile(query.out_edge, query.gated);
  }
  const bool width = plan.tokens == 96 || plan.tokens == 128 ||
                     (!query.gated && (plan.tokens == 192 || plan.tokens == 256));
  return width && !query.transposed &&
         ceil_div(query.in_features, kSm90Reduce) <= resident_panels(plan.tokens);
}

inline Sm90Plan choose_sm90_plan(const Sm90Query& query) {
  Sm90Plan best{false, sm90_tall_tile(query.out_edge, query.gated)};
  double least = sm90_stream_bytes(query, best.tokens);
  const auto offer = [&](const Sm90Plan& plan, double bytes) {
    if (sm90_plan_exists(query, plan) && bytes < least) {
      best = plan;
      least = bytes;
    }
  };
  offer({false, kSm90LowTile}, sm90_stream_bytes(query, kSm90LowTile));
  for (const int tokens : {256, 192, 128, 96}) {
    offer({true, tokens}, sm90_resident_bytes(query, tokens));
  }
  return best;
}

}  // namespace fips::cuda
