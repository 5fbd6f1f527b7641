// block_sparse_mm for Hopper: warpgroup products (wgmma) with weights as the 64-row operand and
// tokens as the wide one. Persistent: a thread block takes every grid-th tile, one warp loads ahead
// across tiles, and the stores of a tile overlap with the next.
//
// Per stage of 64 reduction positions a 128 x 256 tile reads 48 KiB and computes 4.2 MFLOP, about
// 1000 cycles of the tensor cores: 47 bytes a cycle into shared memory and 80 out of it, of 128.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_epilogue.cuh"
#include "kernels/cuda/block_sparse_mm_sm90_load.cuh"

namespace fips::cuda {

// Registers per thread after the roles part: 65536 / 384 threads leaves 168 each to begin with.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + kSm90Consumers * kConsumerRegisters <= 3 * 168, "the file");

// Stages of each product of a tile.
template <class Config>
struct TileSteps {
  int count[Config::kProducts];
};

template <class Config>
FIPS_DEVICE TileSteps<Config> tile_steps(const Sm90Task& task, const Sm90Tile& tile) {
  TileSteps<Config> steps;
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    const BlockRange range = product_range(task, task.product[p], tile.out_block);
    steps.count[p] = (range.end - range.begin) * stages_per_block(task);
  }
  return steps;
}

template <class Config>
FIPS_DEVICE void leave_stage(const Sm90Shared<Config>& shared, int slot) {
  if (lane_index() == 0) {
    mbarrier_arrive(shared.empty(slot));
  }
}

// Descriptors of a consumer's operands in stage 0.
struct OperandBase {
  uint64_t w, x;
};

template <class Config>
FIPS_DEVICE OperandBase operand_base(const Sm90Shared<Config>& shared, int consumer) {
  const int w_skip = Config::kSplitTokens ? 0 : consumer * Config::kWTileBytes;
  const int x_skip = Config::kSplitTokens ? consumer * Config::kN * kSwizzleRowBytes : 0;
  return {mma_descriptor(shared_window_address(shared.w(0) + w_skip)),
          mma_descriptor(shared_window_address(shared.x(0) + x_skip))};
}

// Adds `steps` stages to the sums, with the products of one stage in flight while the next one's
// are issued. On return the last stage's are still in flight and that stage is not left yet;
// `in_flight` says whether there was one before.
template <class Config>
FIPS_DEVICE void accumulate(float (&sums)[Config::kN / 2], const Sm90Shared<Config>& shared,
                            const OperandBase& base, int steps, bool in_flight,
                            StagePlace<Config>& place) {
  FIPS_UNROLL_BY(1)
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(shared.full(place.slot), place.phase);
    const uint64_t skip = static_cast<uint64_t>(place.slot) * (Config::kStageBytes >> 4);
    wgmma_settle(sums);
    wgmma_fence();
    FIPS_UNROLL
    for (int k = 0; k < kSm90Reduce / kMmaReduce; ++k) {
      wgmma<typename Config::Element, Config::kN, Config::kWMajor, MmaMajor::kReduce>(
          sums, base.w + skip + k * mma_reduce_step(Config::kWMajor),
          base.x + skip + k * mma_reduce_step(MmaMajor::kReduce), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 || in_flight) {
      leave_stage(shared, place.previous());
    }
    place.advance();
  }
}

template <class Config>
FIPS_DEVICE void multiply_tile(Sm90Sums<Config>& sums, const Sm90Shared<Config>& shared,
                               const OperandBase& base, const TileSteps<Config>& steps,
                               StagePlace<Config>& place) {
  bool in_flight = false;
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    accumulate(sums.value[p], shared, base, steps.count[p], in_flight, place);
    in_flight = in_flight || steps.count[p] > 0;
  }
  wgmma_wait<0>();
  if (in_flight) {
    leave_stage(shared, place.previous());
  }
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    wgmma_settle(sums.value[p]);
    if (steps.count[p] == 0) {
      FIPS_UNROLL
      for (int i = 0; i < Config::kN / 2; ++i) {
        sums.value[p][i] = 0;
      }
    }
  }
}

template <class Config>
FIPS_DEVICE void consume(const Sm90Task& task, const Sm90Shared<Config>& shared, int consumer) {
  const OperandBase base = operand_base(shared, consumer);
  StagePlace<Config> place;
  int turn = 0;
  int index = static_cast<int>(block_index());
  Sm90Tile tile = sm90_tile<Config>(task, index);
  TileSteps<Config> steps = tile_steps<Config>(task, tile);
  while (true) {
    const ConsumerPlace at = consumer_place<Config>(tile, consumer);
    const Sm90Bias<Config> bias = load_bias<Config>(task, at);
    index += task.grid;
    TileSteps<Config> next_steps{};
    if (index < task.tiles) {  // read ahead: the range of a tile is needed the moment it begins
      tile = sm90_tile<Config>(task, index);
      next_steps = tile_steps<Config>(task, tile);
    }
    Sm90Sums<Config> sums;
    multiply_tile(sums, shared, base, steps, place);
    finish_tile(task, shared, at, sums, bias, turn);
    if (index >= task.tiles) {
      break;
    }
    steps = next_steps;
  }
  if (thread_index() % kWarpgroupSize == 0) {
    tensor_store_wait_read<0>();
  }
}

template <class Config>
FIPS_KERNEL(kSm90Threads, 1)
block_sparse_mm_wgmma(FIPS_GRID_CONSTANT const Sm90Task task) {
  const Sm90Shared<Config> shared{shared_address(dynamic_tile_memory())};
  const int warpgroup = thread_index() / kWarpgroupSize;
  if (thread_index() == 0) {
    prefetch_tensor_map(task.x);
    prefetch_tensor_map(task.out);
    FIPS_UNROLL
    for (int p = 0; p < Config::kProducts; ++p) {
      prefetch_tensor_map(task.product[p].values);
    }
    init_stages(shared);
  }
  block_barrier();
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (warp_index() == 0) {
      produce(task, shared);
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume(task, shared, warpgroup - 1);
  }
}

}  // namespace fips::cuda
