// What the kernels of Hopper's block_sparse_mm share: a ring of stages and the products of a
// consumer warpgroup over it.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_config.h"
#include "kernels/cuda/block_sparse_mm_sm90_task.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx_sm90.cuh"

namespace fips::cuda {

// Registers per thread after the roles part: 65536 / 384 threads leaves 168 each to begin with.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
static_assert(kProducerRegisters + kSm90Consumers * kConsumerRegisters <= 3 * 168, "the file");

// Where a thread is in a ring of stages. `phase` is the parity of the rounds through it.
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

FIPS_DEVICE BlockRange product_range(const Sm90Task& task, const Sm90Product& product,
                                     int out_block) {
  return clamp_range(product.range[out_block], product.range[out_block + 1], product.num_blocks,
                     task.reduce_blocks);
}

// Stages that one stored block fills: 1 or 2.
FIPS_DEVICE int stages_per_block(const Sm90Task& task) {
  return (1 << task.reduce_shift) / kSm90Reduce;
}

// Calls load(block, part) on one warp for every stage of an output block: positions from part * 64
// on of `block`. The lanes read 32 index entries at a time, so that their latency comes once
// per 32.
template <class Load>
FIPS_DEVICE void for_each_stage(const Sm90Task& task, const Sm90Product& product, int out_block,
                                const Load& load) {
  const BlockRange range = product_range(task, product, out_block);
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
        load(block, part);
      }
    }
  }
}

// First row of a stored block in the tensor of values; of one that the index names wrongly, a row
// past the end, where the copy engine reads zeros.
FIPS_DEVICE int value_row(const Sm90Task& task, const Sm90Product& product, const BlockRef& block) {
  return (block.id < 0 ? product.num_blocks : block.id) * task.n_edge;
}

// The index ranges of an output block, as stored: a consumer loads those of the next tile before a
// tile's products, and looks at them after.
template <class Config>
struct TileRanges {
  int32_t begin[Config::kProducts], end[Config::kProducts];
};

template <class Config>
FIPS_DEVICE TileRanges<Config> load_ranges(const Sm90Task& task, int out_block) {
  TileRanges<Config> ranges;
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    ranges.begin[p] = task.product[p].range[out_block];
    ranges.end[p] = task.product[p].range[out_block + 1];
  }
  return ranges;
}

// Stages of each product of an output block.
template <class Config>
struct TileSteps {
  int count[Config::kProducts];
};

template <class Config>
FIPS_DEVICE TileSteps<Config> tile_steps(const Sm90Task& task, const TileRanges<Config>& ranges) {
  TileSteps<Config> steps;
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    const BlockRange range =
        clamp_range(ranges.begin[p], ranges.end[p], task.product[p].num_blocks, task.reduce_blocks);
    steps.count[p] = (range.end - range.begin) * stages_per_block(task);
  }
  return steps;
}

// A consumer's sums: 64 outputs by kN tokens, as mma_accumulator says.
template <class Config>
struct Sm90Sums {
  float value[Config::kProducts][Config::kN / 2];
};

// Descriptors of the operands of one stage: low words, where the address is.
struct MmaOperands {
  uint32_t w, x;
};

FIPS_DEVICE uint32_t mma_operand(SharedAddress tile) {
  return static_cast<uint32_t>(mma_descriptor(shared_window_address(tile)));
}
FIPS_DEVICE uint64_t whole_descriptor(uint32_t low) { return mma_descriptor(0) >> 32 << 32 | low; }

// Adds `steps` stages to the sums, with the products of one stage in flight while the next one's
// are issued. On return the last stage's are still in flight and that stage is not left yet;
// `in_flight` says whether there was one before. `stages` waits for a stage and leaves it.
template <class Config, class Stages>
FIPS_DEVICE void accumulate(float (&sums)[Config::kN / 2], const Stages& stages, int steps,
                            bool in_flight, StagePlace<Config>& place) {
  FIPS_UNROLL_BY(1)
  for (int step = 0; step < steps; ++step) {
    const MmaOperands operands = stages.enter(place);
    wgmma_settle(sums);
    wgmma_fence();
    FIPS_UNROLL
    for (int k = 0; k < kSm90Reduce / kMmaReduce; ++k) {
      wgmma<typename Config::Element, Config::kN, Config::kWMajor, MmaMajor::kReduce>(
          sums, whole_descriptor(operands.w + k * mma_reduce_step(Config::kWMajor)),
          whole_descriptor(operands.x + k * mma_reduce_step(MmaMajor::kReduce)), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 || in_flight) {
      stages.leave(place.previous());
    }
    place.advance();
  }
}

template <class Config, class Stages>
FIPS_DEVICE void multiply_tile(Sm90Sums<Config>& sums, const Stages& stages,
                               const TileSteps<Config>& steps, StagePlace<Config>& place) {
  bool in_flight = false;
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    accumulate(sums.value[p], stages, steps.count[p], in_flight, place);
    in_flight = in_flight || steps.count[p] > 0;
  }
  wgmma_wait<0>();
  if (in_flight) {
    stages.leave(place.previous());
  }
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    wgmma_settle(sums.value[p]);
    if (steps.count[p] == 0) {
      wgmma_clear(sums.value[p]);
    }
  }
}

}  // namespace fips::cuda
