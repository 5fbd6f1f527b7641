// The stages of the kernel that streams both operands, and the warp that fills them: it walks the
// index of each output block and has the copy engine bring the stored blocks and the rows of x that
// they meet.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_pipeline.cuh"

namespace fips::cuda {

template <class Config>
struct StreamShared {
  SharedAddress base;

  FIPS_DEVICE_MEMBER SharedAddress x(int slot) const { return base + slot * Config::kStageBytes; }
  FIPS_DEVICE_MEMBER SharedAddress w(int slot) const { return x(slot) + Config::kXBytes; }
  FIPS_DEVICE_MEMBER SharedAddress store(int consumer, int buffer) const {
    return base + Config::kStoresOffset + (consumer * kStoreBuffers + buffer) * Config::kStoreBytes;
  }
  FIPS_DEVICE_MEMBER SharedAddress full(int slot) const {
    return base + Config::kBarriersOffset + slot * 8;
  }
  FIPS_DEVICE_MEMBER SharedAddress empty(int slot) const {
    return full(slot) + Config::kStages * 8;
  }
};

// By one thread, before the block barrier that starts the roles. A stage is full when its bytes
// have come, and empty when every consumer warp has left it.
template <class Config>
FIPS_DEVICE void init_stages(const StreamShared<Config>& shared) {
  for (int slot = 0; slot < Config::kStages; ++slot) {
    mbarrier_init(shared.full(slot), 1);
    mbarrier_init(shared.empty(slot), kSm90Consumers * kWarpsPerWarpgroup);
  }
  mbarrier_init_fence();
}

struct Sm90Tile {
  int token;      // first token
  int out_block;  // which output block
};

template <class Config>
FIPS_DEVICE Sm90Tile sm90_tile(const Sm90Task& task, int index) {
  const TileIndex tile = raster_tile<int>(index, task.token_tiles, task.out_blocks);
  return {static_cast<int>(tile.token_tile) * Config::kTokens, static_cast<int>(tile.out_block)};
}

// Positions from part * 64 on of the stored block, and the features of x that they meet.
template <class Config>
FIPS_DEVICE void load_stage(const Sm90Task& task, const Sm90Product& product,
                            const StreamShared<Config>& shared, const StagePlace<Config>& place,
                            const BlockRef& block, int token, int part) {
  const SharedAddress full = shared.full(place.slot);
  mbarrier_wait(shared.empty(place.slot), place.phase ^ 1);
  mbarrier_arrive_expect(full, Config::kStageBytes);
  const int within = part * kSm90Reduce;
  const int feature = block.id < 0 ? task.in_features : block.feature + within;
  const int row = value_row(task, product, block);
  tensor_load(shared.x(place.slot), task.x, feature, token, full);
  if constexpr (Config::kTransposed) {
    FIPS_UNROLL
    for (int out = 0; out < Config::kOut; out += kMmaRows) {
      tensor_load(shared.w(place.slot) + out / kMmaRows * kWTileBytes, product.values, out,
                  row + within, full);
    }
  } else {
    tensor_load(shared.w(place.slot), product.values, within, row, full);
  }
}

// One warp.
template <class Config>
FIPS_DEVICE void produce(const Sm90Task& task, const StreamShared<Config>& shared) {
  const bool leader = elect_one();
  StagePlace<Config> place;
  for (int index = static_cast<int>(block_index()); index < task.tiles; index += task.grid) {
    const Sm90Tile tile = sm90_tile<Config>(task, index);
    FIPS_UNROLL
    for (int p = 0; p < Config::kProducts; ++p) {
      for_each_stage(task, task.product[p], tile.out_block, [&](const BlockRef& block, int part) {
        if (leader) {
          load_stage(task, task.product[p], shared, place, block, tile.token, part);
        }
        place.advance();
      });
    }
  }
}

// The stages as a consumer sees them.
template <class Config>
struct StreamStages {
  StreamShared<Config> shared;
  MmaOperands first;  // operands in stage 0

  FIPS_DEVICE_MEMBER MmaOperands enter(const StagePlace<Config>& place) const {
    mbarrier_wait(shared.full(place.slot), place.phase);
    const uint32_t skip = static_cast<uint32_t>(place.slot) * (Config::kStageBytes >> 4);
    return {first.w + skip, first.x + skip};
  }
  FIPS_DEVICE_MEMBER void leave(int slot) const {
    if (lane_index() == 0) {
      mbarrier_arrive(shared.empty(slot));
    }
  }
};

template <class Config>
FIPS_DEVICE StreamStages<Config> stream_stages(const StreamShared<Config>& shared, int consumer) {
  const int w_skip = Config::kSplitTokens ? 0 : consumer * kWTileBytes;
  const int x_skip = Config::kSplitTokens ? consumer * Config::kN * kSwizzleRowBytes : 0;
  return {shared, {mma_operand(shared.w(0) + w_skip), mma_operand(shared.x(0) + x_skip)}};
}

}  // namespace fips::cuda
