// The stages of Hopper's block_sparse_mm and the warp that fills them: it walks the index of each
// output block and has the copy engine bring the stored blocks and the rows of x that they meet.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_config.h"
#include "kernels/cuda/block_sparse_mm_sm90_task.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx_sm90.cuh"

namespace fips::cuda {

// Where a thread is in the ring of stages. `phase` is the parity of the rounds through it.
template <class Config>
struct StagePlace {
  int slot = 0;
  uint32_t phase = 0;

  FIPS_DEVICE_MEMBER void advance() {
    if (++slot == Config::kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
  FIPS_DEVICE_MEMBER int previous() const { return slot == 0 ? Config::kStages - 1 : slot - 1; }
};

template <class Config>
struct Sm90Shared {
  SharedAddress base;

  FIPS_DEVICE_MEMBER SharedAddress x(int slot) const { return base + slot * Config::kStageBytes; }
  FIPS_DEVICE_MEMBER SharedAddress w(int slot) const { return x(slot) + Config::kXBytes; }
  FIPS_DEVICE_MEMBER SharedAddress store(int consumer, int buffer) const {
    return base + Config::kStoresOffset +
           (consumer * Config::kStoreBuffers + buffer) * Config::kStoreBytes;
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
FIPS_DEVICE void init_stages(const Sm90Shared<Config>& shared) {
  for (int slot = 0; slot < Config::kStages; ++slot) {
    mbarrier_init(shared.full(slot), 1);
    mbarrier_init(shared.empty(slot), kSm90Consumers * kWarpgroupSize / kWarpSize);
  }
  mbarrier_init_fence();
}

struct Sm90Tile {
  int token;      // first token
  int out_block;  // which output block
};

template <class Config>
FIPS_DEVICE Sm90Tile sm90_tile(const Sm90Task& task, int index) {
  const TileIndex tile = tile_of(index, task.token_tiles, task.out_blocks);
  return {static_cast<int>(tile.token_tile) * Config::kTokens, static_cast<int>(tile.out_block)};
}

FIPS_DEVICE BlockRange product_range(const Sm90Task& task, const Sm90Product& product,
                                     int out_block) {
  return clamp_range(product.range[out_block], product.range[out_block + 1], product.num_blocks,
                     task.reduce_blocks);
}

// Stages that one stored block fills: 1 or 2.
FIPS_DEVICE int stages_per_block(const Sm90Task& task) {
  return (1 << task.reduce_shift) / kSm90Reduce;
}

// Reduction positions from `part` * 64 on of the stored block. One that the index names wrongly is
// read outside the tensors, as zeros.
template <class Config>
FIPS_DEVICE void load_stage(const Sm90Task& task, const Sm90Product& product,
                            const Sm90Shared<Config>& shared, const StagePlace<Config>& place,
                            const BlockRef& block, int token, int part) {
  const SharedAddress full = shared.full(place.slot);
  mbarrier_wait(shared.empty(place.slot), place.phase ^ 1);
  mbarrier_arrive_expect(full, Config::kStageBytes);
  const int within = part * kSm90Reduce;
  const int feature = block.id < 0 ? task.in_features : block.feature + within;
  const int row = (block.id < 0 ? product.num_blocks : block.id) * task.n_edge;
  tensor_load(shared.x(place.slot), task.x, feature, token, full);
  if constexpr (Config::kTransposed) {
    FIPS_UNROLL
    for (int out = 0; out < Config::kOut; out += kMmaRows) {
      tensor_load(shared.w(place.slot) + out / kMmaRows * Config::kWTileBytes, product.values, out,
                  row + within, full);
    }
  } else {
    tensor_load(shared.w(place.slot), product.values, within, row, full);
  }
}

// One warp. Its lanes read 32 index entries at a time, so that their latency comes once per 32.
template <class Config>
FIPS_DEVICE void load_product(const Sm90Task& task, const Sm90Product& product,
                              const Sm90Shared<Config>& shared, const Sm90Tile& tile, bool leader,
                              StagePlace<Config>& place) {
  const BlockRange range = product_range(task, product, tile.out_block);
  const int parts = stages_per_block(task);
  for (int first = range.begin; first < range.end; first += kWarpSize) {
    const int entry = first + lane_index();
    BlockRef mine{-1, 0};
    if (entry < range.end) {
      const int id = product.block_id == nullptr ? entry : product.block_id[entry];
      mine = checked_ref(id, product.reduce_index[entry], product.num_blocks, task.reduce_blocks,
                         task.reduce_shift);
    }
    const int count = elements_below(first, range.end, kWarpSize);
    for (int i = 0; i < count; ++i) {
      const BlockRef block{static_cast<int>(shuffle(mine.id, i)),
                           static_cast<int>(shuffle(mine.feature, i))};
      for (int part = 0; part < parts; ++part) {
        if (leader) {
          load_stage(task, product, shared, place, block, tile.token, part);
        }
        place.advance();
      }
    }
  }
}

template <class Config>
FIPS_DEVICE void produce(const Sm90Task& task, const Sm90Shared<Config>& shared) {
  const bool leader = elect_one();
  StagePlace<Config> place;
  for (int index = static_cast<int>(block_index()); index < task.tiles; index += task.grid) {
    const Sm90Tile tile = sm90_tile<Config>(task, index);
    FIPS_UNROLL
    for (int p = 0; p < Config::kProducts; ++p) {
      load_product(task, task.product[p], shared, tile, leader, place);
    }
  }
}

}  // namespace fips::cuda
