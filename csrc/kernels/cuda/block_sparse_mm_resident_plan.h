// What one launch of block_sparse_mm_resident works on and how it is cut: plain host code.
#pragma once

#include <optional>

#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

inline constexpr int kResidentWarps = 12;

struct ResidentPlan {
  int token_tile;    // 64 or 128
  int stride;        // bytes between the tokens of a tile
  int splits;        // thread blocks that share a tile of tokens, each with a range of strips
  int split_strips;  // strips of 16 outputs of each
};

struct ResidentTask {
  BlockSparseMmParams p;
  BlockSparseView gate;
  const void* gate_bias;
  Activation activation;
  ResidentPlan plan;
};

struct ResidentQuery {
  int64_t tokens, features, strips, stored_slots;  // features: padded to whole blocks
  int sm_count, max_shared_bytes;
};

// A multiprocessor loads about this many bytes of L2, and multiplies about this many pairs, in a
// cycle: estimates, which only weigh the two against each other.
inline constexpr int64_t kResidentLoadBytes = 24, kResidentMultiplies = 800;

// Loading a tile costs each of the blocks that share it; too few blocks leave a last wave half
// empty. The cheapest number of splits, by counting cycles.
inline int choose_resident_splits(const ResidentQuery& q, int token_tile) {
  const int64_t tiles = ceil_div(q.tokens, token_tile);
  const int64_t load = token_tile * q.features * 2 / kResidentLoadBytes;
  const int64_t work = token_tile * q.stored_slots / kResidentMultiplies;
  int best = 1;
  int64_t least = -1;
  const int64_t most = max_of(1, min_of(16, q.strips / kResidentWarps));
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t waves = ceil_div(tiles * splits, q.sm_count);
    const int64_t cost = waves * (load + ceil_div(work, splits));
    if (least < 0 || cost < least) {
      least = cost;
      best = static_cast<int>(splits);
    }
  }
  return best;
}

// The taller tile reads every stored block for more tokens. Null: the features do not fit.
inline std::optional<ResidentPlan> plan_resident(const ResidentQuery& q) {
  const int64_t stride = round_up(2 * q.features, 128) + 32;  // TokenTile::stride_of
  for (const int token_tile : {128, 64}) {
    if (stride * token_tile <= q.max_shared_bytes && (q.tokens > 64 || token_tile == 64)) {
      const int splits = choose_resident_splits(q, token_tile);
      return ResidentPlan{token_tile, static_cast<int>(stride), splits,
                          static_cast<int>(ceil_div(q.strips, splits))};
    }
  }
  return std::nullopt;
}

inline ResidentQuery resident_query(const BlockSparseMmParams& p, const MmEpilogue& epilogue,
                                    const DeviceInfo& device) {
  int64_t features = p.v.block_rows() * p.v.bk, slots = p.v.num_blocks * p.v.slots();
  if (epilogue.gate != nullptr) {
    features = max_of(features, epilogue.gate->block_rows() * epilogue.gate->bk);
    slots += epilogue.gate->num_blocks * epilogue.gate->slots();
  }
  return {p.tokens, features,        ceil_div(p.v.cols, 16),
          slots,    device.sm_count, device.max_shared_bytes};
}

}  // namespace fips::cuda
