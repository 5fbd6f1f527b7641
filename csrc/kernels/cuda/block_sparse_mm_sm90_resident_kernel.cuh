// block_sparse_mm for Hopper with x in shared memory: for few input features (r <= 768) the rows of
// x of a token tile stay there, and only weights are streamed. Against streaming both, 64 x 64
// blocks move half of the bytes: per stage 8 KiB for 64 x N x 64 products, 43 bytes a cycle of the
// tensor cores for N = 96 (80 when x is gathered for 256 tokens), 21 for N = 192.
//
// The work is cut into items (token tile, 64 outputs), token tile by token tile; a thread block has
// a contiguous share and reloads x where the token tile changes. Its two consumers take alternate
// items through rings of their own, so that one's epilogue overlaps with the other's products.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_epilogue.cuh"
#include "kernels/cuda/block_sparse_mm_sm90_pipeline.cuh"
#include "kernels/cuda/block_sparse_mm_sm90_resident_config.h"

namespace fips::cuda {

template <class Config>
struct ResidentShared {
  SharedAddress base;

  FIPS_DEVICE_MEMBER SharedAddress x(int panel) const { return base + panel * Config::kPanelBytes; }
  FIPS_DEVICE_MEMBER SharedAddress w(int consumer, int slot) const {
    return base + Config::kRingsOffset + ring_index(consumer, slot) * kWTileBytes;
  }
  FIPS_DEVICE_MEMBER SharedAddress store(int consumer, int buffer) const {
    return base + Config::kStoresOffset + (consumer * kStoreBuffers + buffer) * Config::kStoreBytes;
  }
  FIPS_DEVICE_MEMBER SharedAddress full(int consumer, int slot) const {
    return base + Config::kBarriersOffset + ring_index(consumer, slot) * 8;
  }
  FIPS_DEVICE_MEMBER SharedAddress empty(int consumer, int slot) const {
    return full(consumer, slot) + kSm90Consumers * Config::kStages * 8;
  }
  FIPS_DEVICE_MEMBER SharedAddress panel_full(int panel) const {
    return base + Config::kPanelBarriersOffset + panel * 8;
  }
  FIPS_DEVICE_MEMBER SharedAddress panels_empty() const { return panel_full(Config::kMaxPanels); }

  // Which panel of x the weights in a stage multiply. Written before the stage's arrival, read
  // after waiting for it.
  FIPS_DEVICE_MEMBER int& panel_of(int consumer, int slot) const {
    return reinterpret_cast<int*>(dynamic_tile_memory() +
                                  Config::kPanelIndexOffset)[ring_index(consumer, slot)];
  }

 private:
  FIPS_DEVICE_MEMBER static int ring_index(int consumer, int slot) {
    return consumer * Config::kStages + slot;
  }
};

template <class Config>
FIPS_DEVICE void init_rings(const ResidentShared<Config>& shared) {
  for (int consumer = 0; consumer < kSm90Consumers; ++consumer) {
    for (int slot = 0; slot < Config::kStages; ++slot) {
      mbarrier_init(shared.full(consumer, slot), 1);
      mbarrier_init(shared.empty(consumer, slot), kWarpsPerWarpgroup);
    }
  }
  for (int panel = 0; panel < Config::kMaxPanels; ++panel) {
    mbarrier_init(shared.panel_full(panel), 1);
  }
  mbarrier_init(shared.panels_empty(), kSm90Consumers * kWarpsPerWarpgroup);
  mbarrier_init_fence();
}

// Calls run(token, first_unit, end_unit, parity) for every token tile in this thread block's share;
// a unit is 64 outputs, the parity alternates with the reloads of x.
template <class Config, class Run>
FIPS_DEVICE void for_each_token_tile(const Sm90Task& task, const Run& run) {
  const int units = task.tiles / task.token_tiles;
  int item = static_cast<int>(block_index() * task.tiles / task.grid);
  const int end = static_cast<int>((block_index() + 1) * task.tiles / task.grid);
  for (uint32_t parity = 0; item < end; parity ^= 1) {
    const int tile = item / units, first = item - tile * units;
    const int count = elements_below(first, units, end - item);
    run(tile * Config::kN, first, first + count, parity);
    item += count;
  }
}

FIPS_DEVICE int units_per_block(const Sm90Task& task) { return task.n_edge / kMmaRows; }

// Past the last feature: zeros.
FIPS_DEVICE int panel_count(const Sm90Task& task) {
  return task.reduce_blocks * stages_per_block(task);
}

// The warp that brings x, panel by panel of 64 features: products begin with the first ones.
template <class Config>
FIPS_DEVICE void produce_panels(const Sm90Task& task, const ResidentShared<Config>& shared) {
  const bool leader = elect_one();
  for_each_token_tile<Config>(task, [&](int token, int, int, uint32_t parity) {
    if (leader) {
      mbarrier_wait(shared.panels_empty(), parity ^ 1);
      for (int panel = 0; panel < panel_count(task); ++panel) {
        mbarrier_arrive_expect(shared.panel_full(panel), Config::kPanelBytes);
        tensor_load(shared.x(panel), task.x, panel * kSm90Reduce, token, shared.panel_full(panel));
      }
    }
  });
}

// The warp that brings one consumer's weights. A stored block that the index names wrongly is read
// as zeros, against panel 0 (so that infinities in x would make NaNs of it).
template <class Config>
FIPS_DEVICE void produce_weights(const Sm90Task& task, const ResidentShared<Config>& shared,
                                 int consumer) {
  const bool leader = elect_one();
  StagePlace<Config> place;
  for_each_token_tile<Config>(task, [&](int, int first, int end, uint32_t) {
    for (int unit = first + consumer; unit < end; unit += kSm90Consumers) {
      const int out_block = unit / units_per_block(task);
      const int within = unit % units_per_block(task) * kMmaRows;
      FIPS_UNROLL
      for (int p = 0; p < Config::kProducts; ++p) {
        const Sm90Product& product = task.product[p];
        for_each_stage(task, product, out_block, [&](const BlockRef& block, int part) {
          if (leader) {
            const SharedAddress full = shared.full(consumer, place.slot);
            mbarrier_wait(shared.empty(consumer, place.slot), place.phase ^ 1);
            const int panel = block.id < 0 ? 0 : block.feature / kSm90Reduce + part;
            shared.panel_of(consumer, place.slot) = panel;
            mbarrier_arrive_expect(full, kWTileBytes);
            tensor_load(shared.w(consumer, place.slot), product.values, part * kSm90Reduce,
                        value_row(task, product, block) + within, full);
          }
          place.advance();
        });
      }
    }
  });
}

// The stages as a consumer sees them.
template <class Config>
struct ResidentStages {
  ResidentShared<Config> shared;
  int consumer;
  uint32_t parity;  // of the load of x
  MmaOperands first;

  FIPS_DEVICE_MEMBER MmaOperands enter(const StagePlace<Config>& place) const {
    mbarrier_wait(shared.full(consumer, place.slot), place.phase);
    // One value per warp: the descriptor is made of uniform registers.
    const int panel = static_cast<int>(shuffle(shared.panel_of(consumer, place.slot), 0));
    mbarrier_wait(shared.panel_full(panel), parity);
    return {first.w + static_cast<uint32_t>(place.slot) * (kWTileBytes >> 4),
            first.x + static_cast<uint32_t>(panel) * (Config::kPanelBytes >> 4)};
  }
  FIPS_DEVICE_MEMBER void leave(int slot) const {
    if (lane_index() == 0) {
      mbarrier_arrive(shared.empty(consumer, slot));
    }
  }
};

// A consumer that used no panel, or not all, waits for them nonetheless: it may neither get a token
// tile ahead of the other, whose arrival it would stand in for, nor end while copies are under way.
template <class Config>
FIPS_DEVICE void leave_panels(const Sm90Task& task, const ResidentShared<Config>& shared,
                              uint32_t parity) {
  for (int panel = 0; panel < panel_count(task); ++panel) {
    mbarrier_wait(shared.panel_full(panel), parity);
  }
  warp_barrier();  // a lane still polling would miss the phase once the producer goes on
  if (lane_index() == 0) {
    mbarrier_arrive(shared.panels_empty());
  }
}

template <class Config>
FIPS_DEVICE void consume_resident(const Sm90Task& task, const ResidentShared<Config>& shared,
                                  int consumer) {
  ResidentStages<Config> stages{
      shared, consumer, 0, {mma_operand(shared.w(consumer, 0)), mma_operand(shared.x(0))}};
  StagePlace<Config> place;
  int turn = 0;
  for_each_token_tile<Config>(task, [&](int token, int first, int end, uint32_t parity) {
    stages.parity = parity;
    int unit = first + consumer;
    TileRanges<Config> ranges{};
    if (unit < end) {
      ranges = load_ranges<Config>(task, unit / units_per_block(task));
    }
    while (unit < end) {
      const ConsumerPlace at{consumer, unit * kMmaRows, token};
      const Sm90Bias<Config> bias = load_bias<Config>(task, at);
      unit += kSm90Consumers;
      const TileSteps<Config> steps = tile_steps(task, ranges);
      if (unit < end) {
        ranges = load_ranges<Config>(task, unit / units_per_block(task));
      }
      Sm90Sums<Config> sums;
      multiply_tile(sums, stages, steps, place);
      finish_tile<Config>(task, shared, at, sums, bias, turn);
    }
    leave_panels(task, shared, parity);
  });
  finish_stores();
}

template <class Config>
FIPS_KERNEL(kSm90Threads, 1)
block_sparse_mm_wgmma_resident(FIPS_GRID_CONSTANT const Sm90Task task) {
  const ResidentShared<Config> shared{shared_address(dynamic_tile_memory())};
  const int warpgroup = thread_index() / kWarpgroupSize;
  if (thread_index() == 0) {
    prefetch_tensor_maps<Config>(task);
    init_rings(shared);
  }
  block_barrier();
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (warp_index() < kSm90Consumers) {
      produce_weights(task, shared, warp_index());
    } else if (warp_index() == kSm90Consumers) {
      produce_panels(task, shared);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume_resident(task, shared, warpgroup - 1);
  }
}

}  // namespace fips::cuda
