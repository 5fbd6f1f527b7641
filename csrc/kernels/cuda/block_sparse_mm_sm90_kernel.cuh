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

// A consumer's share of a tile.
template <class Config>
FIPS_DEVICE ConsumerPlace consumer_place(const Sm90Tile& tile, int consumer) {
  const int feature = tile.out_block * Config::kOut;
  return Config::kSplitTokens ? ConsumerPlace{consumer, feature, tile.token + consumer * Config::kN}
                              : ConsumerPlace{consumer, feature + consumer * kMmaRows, tile.token};
}

template <class Config>
FIPS_DEVICE void consume(const Sm90Task& task, const StreamShared<Config>& shared, int consumer) {
  const StreamStages<Config> stages = stream_stages(shared, consumer);
  StagePlace<Config> place;
  int turn = 0;
  int index = static_cast<int>(block_index());
  Sm90Tile tile = sm90_tile<Config>(task, index);
  TileRanges<Config> ranges = load_ranges<Config>(task, tile.out_block);
  while (true) {
    const ConsumerPlace at = consumer_place<Config>(tile, consumer);
    const Sm90Bias<Config> bias = load_bias<Config>(task, at);
    index += task.grid;
    const TileSteps<Config> steps = tile_steps(task, ranges);
    if (index < task.tiles) {
      tile = sm90_tile<Config>(task, index);
      ranges = load_ranges<Config>(task, tile.out_block);
    }
    Sm90Sums<Config> sums;
    multiply_tile(sums, stages, steps, place);
    finish_tile<Config>(task, shared, at, sums, bias, turn);
    if (index >= task.tiles) {
      break;
    }
  }
  finish_stores();
}

template <class Config>
FIPS_KERNEL(kSm90Threads, 1)
block_sparse_mm_wgmma(FIPS_GRID_CONSTANT const Sm90Task task) {
  const StreamShared<Config> shared{shared_address(dynamic_tile_memory())};
  const int warpgroup = thread_index() / kWarpgroupSize;
  if (thread_index() == 0) {
    prefetch_tensor_maps<Config>(task);
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
