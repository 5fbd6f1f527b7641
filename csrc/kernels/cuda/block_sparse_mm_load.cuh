// Global to shared memory for block_sparse_mm: one pipeline stage covers kReduce positions of the
// reduction axis, which is the stored blocks of one output block laid end to end (indexing.h).
//   x tile  [kTokens][kReduce]                         reduction contiguous
//   w tile  [kOut][kReduce], or [kReduce][kOut] for the transposed product, as the blocks are
//   stored
// Both are swizzled. Positions past the end, features past a ragged edge, tokens past the last one
// and index entries out of range are zeros.
#pragma once

#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/slice.cuh"

namespace fips::cuda {

template <class T, int kTokens_, int kOut_, bool kTransposed_, bool kBitmap_>
struct MmConfig {
  using Element = T;
  static constexpr int kTokens = kTokens_;
  static constexpr int kOut = kOut_;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr bool kBitmap = kBitmap_;

  static constexpr int kReduce = kStageBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunk = Chunk<T>::kSize;
  static constexpr int kReduceChunks = kReduce / kChunk;  // 8
  static constexpr int kWRows = kTransposed ? kReduce : kOut;
  static constexpr int kWChunks = (kTransposed ? kOut : kReduce) / kChunk;
  static constexpr int kXBytes = kTokens * kStageBytes;
  static constexpr int kTileBytes = kXBytes + kWRows * kWChunks * kChunkBytes;
  static constexpr int kStages = kTokens == 16 ? 4 : 3;
  static constexpr int kSharedBytes = kStages * kTileBytes;
};

// The work of one thread block.
struct MmTile {
  int64_t token;     // first token
  int out_block;     // which output block
  BlockRange range;  // its entries in the index list
};

template <class Config>
FIPS_DEVICE MmTile locate_tile(const MmTask& task) {
  const int64_t token_tiles = ceil_div(task.tokens, Config::kTokens);
  const TileIndex tile = tile_of(block_index(), token_tiles, task.out_blocks);
  const int32_t begin = task.range[tile.out_block], end = task.range[tile.out_block + 1];
  return {tile.token_tile * Config::kTokens, static_cast<int>(tile.out_block),
          clamp_range(begin, end, task.num_blocks, task.reduce_blocks)};
}

// The stored block at reduction position `position`.
FIPS_DEVICE BlockRef block_at(const MmTask& task, const MmTile& tile, int position) {
  const int entry = tile.range.begin + (position >> task.reduce_shift);
  if (entry >= tile.range.end) {
    return {-1, 0};
  }
  const int id = task.block_id == nullptr ? entry : task.block_id[entry];
  return checked_ref(id, task.reduce_index[entry], task.num_blocks, task.reduce_blocks,
                     task.reduce_shift);
}

FIPS_DEVICE int offset_in_block(const MmTask& task, int position) {
  return position & ((1 << task.reduce_shift) - 1);
}

template <class Config, int kThreads>
FIPS_DEVICE void stage_x(const MmTask& task, const MmTile& tile, int step, unsigned char* x_tile) {
  using T = typename Config::Element;
  constexpr int kChunks = Config::kReduceChunks, kRowsPerPass = kThreads / kChunks;
  const int chunk = thread_index() % kChunks, first_row = thread_index() / kChunks;
  const int position = step * Config::kReduce + chunk * Config::kChunk;
  const BlockRef block = block_at(task, tile, position);
  const int feature = block.feature + offset_in_block(task, position);
  const int valid = block.id < 0 ? 0 : elements_below(feature, task.in_features, Config::kChunk);
  const T* x = static_cast<const T*>(task.x);
  static_assert(Config::kTokens % kRowsPerPass == 0, "every pass is full");
  FIPS_UNROLL
  for (int pass = 0; pass < Config::kTokens / kRowsPerPass; ++pass) {
    const int row = pass * kRowsPerPass + first_row;
    const int64_t token = tile.token + row;
    const int count = token < task.tokens ? valid : 0;
    const T* source = count > 0 ? x + token * task.x_stride + feature : x;
    stage_chunk(x_tile + swizzled_offset<kChunks>(row, chunk), source, count, task.wide_x);
  }
}

// `block` encoding: chunks are copied as they are stored.
template <class Config, int kThreads>
FIPS_DEVICE void stage_w_block(const MmTask& task, const MmTile& tile, int step,
                               unsigned char* w_tile) {
  using T = typename Config::Element;
  constexpr int kChunks = Config::kWChunks;
  const T* values = static_cast<const T*>(task.values);
  static_assert(Config::kWRows * kChunks % kThreads == 0, "every pass is full");
  FIPS_UNROLL_BY(2)  // more would only hold more addresses in registers
  for (int pass = 0; pass < Config::kWRows * kChunks / kThreads; ++pass) {
    const int item = pass * kThreads + thread_index();
    const int row = item / kChunks, chunk = item % kChunks;
    const int reduce = Config::kTransposed ? row : chunk * Config::kChunk;
    const int out = Config::kTransposed ? chunk * Config::kChunk : row;
    const int position = step * Config::kReduce + reduce;
    const BlockRef block = block_at(task, tile, position);
    const int offset = offset_in_block(task, position);
    const int j = Config::kTransposed ? offset : out, k = Config::kTransposed ? out : offset;
    const int count = block.id < 0 ? 0 : Config::kChunk;
    const T* source =
        count > 0 ? values + block.id * int64_t{task.slots} + (j << task.k_shift) + k : values;
    stage_chunk(w_tile + swizzled_offset<kChunks>(row, chunk), source, count, task.wide_values);
  }
}

// ---- `bitmap` encoding
// ---------------------------------------------------------------------------

// Where slot (j, k) of a block whose first reduction position in this stage is `shift_in` belongs
// in the w tile; -1 when the slot lies outside the stage.
template <class Config>
FIPS_DEVICE int slot_offset(int j, int k, int shift_in) {
  using T = typename Config::Element;
  const int reduce = (Config::kTransposed ? j : k) + shift_in;
  if (reduce < 0 || reduce >= Config::kReduce) {
    return -1;
  }
  const int row = Config::kTransposed ? reduce : j, column = Config::kTransposed ? k : reduce;
  return swizzled_offset<Config::kWChunks>(row, column / Config::kChunk) +
         (column % Config::kChunk) * static_cast<int>(sizeof(T));
}

// One warp expands up to 32 mask words of stored block `id`, from `first_word` on.
template <class Config>
FIPS_DEVICE void expand_words(const MmTask& task, int id, int first_word, int words, int shift_in,
                              unsigned char* w_tile) {
  using T = typename Config::Element;
  const T* values = static_cast<const T*>(task.bitmap.values);
  walk_slots(task.bitmap, id, first_word, words, [&](int slot, int64_t index) {
    const int offset =
        slot_offset<Config>(slot >> task.k_shift, slot & ((1 << task.k_shift) - 1), shift_in);
    if (offset >= 0) {
      *reinterpret_cast<T*>(w_tile + offset) = index >= 0 ? values[index] : T{};
    }
  });
}

template <class Config, int kThreads>
FIPS_DEVICE void stage_w_bitmap(const MmTask& task, const MmTile& tile, int step,
                                unsigned char* w_tile) {
  const int first = step * Config::kReduce;
  const int edge = 1 << task.reduce_shift;
  const int blocks = edge < Config::kReduce ? Config::kReduce / edge : 1;
  const int block_words = task.slots / 32;
  const int groups = block_words > kWarpSize ? block_words / kWarpSize : 1;
  for (int item = warp_index(); item < blocks * groups; item += kThreads / kWarpSize) {
    const int which = item / groups, first_word = item % groups * kWarpSize;
    const int position = first + which * edge;
    const int words = block_words < kWarpSize ? block_words : kWarpSize;
    const int shift_in = which * edge - offset_in_block(task, position);
    expand_words<Config>(task, block_at(task, tile, position).id, first_word, words, shift_in,
                         w_tile);
  }
}

// Starts stage `step` of a tile; completes after cp_async_wait and a barrier.
template <class Config, int kThreads>
FIPS_DEVICE void start_stage(const MmTask& task, const MmTile& tile, int step,
                             unsigned char* stage) {
  stage_x<Config, kThreads>(task, tile, step, stage);
  if constexpr (Config::kBitmap) {
    stage_w_bitmap<Config, kThreads>(task, tile, step, stage + Config::kXBytes);
  } else {
    stage_w_block<Config, kThreads>(task, tile, step, stage + Config::kXBytes);
  }
}

// Runs `compute(stage)` over the whole reduction with kStages - 1 stages in flight. One barrier a
// step is enough: the slot refilled at a step was read at the previous one, before that step's
// barrier.
template <class Config, int kThreads, class Compute>
FIPS_DEVICE void pipeline(const MmTask& task, const MmTile& tile, unsigned char* shared,
                          const Compute& compute) {
  constexpr int kAhead = Config::kStages - 1;
  const int length = (tile.range.end - tile.range.begin) << task.reduce_shift;
  const int steps = (length + Config::kReduce - 1) / Config::kReduce;
  int slot = 1, refill = 0;  // slot comes round to 0 at step 0
  for (int step = -kAhead; step < steps; ++step) {
    if (step >= 0) {
      cp_async_wait<kAhead - 1>();
      block_barrier();
    }
    if (step + kAhead < steps) {
      start_stage<Config, kThreads>(task, tile, step + kAhead,
                                    shared + refill * Config::kTileBytes);
    }
    cp_async_commit();  // an empty group keeps the count of groups equal to the count of steps
    if (step >= 0) {
      compute(shared + slot * Config::kTileBytes);
    }
    slot = slot + 1 == Config::kStages ? 0 : slot + 1;
    refill = refill + 1 == Config::kStages ? 0 : refill + 1;
  }
}

}  // namespace fips::cuda
