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

// Starts the stages of a tile one after the other. With small tiles the instructions that find
// addresses would cost as much as the products: what stays the same is kept, a thread's rows of x
// and of w lie at one chunk of the reduction and share its block, and the index is read a stage
// before it is needed.
template <class Config, int kThreads>
class StageLoader {
  using T = typename Config::Element;
  static constexpr int kChunks = Config::kReduceChunks;
  static constexpr int kRowsPerPass = kThreads / kChunks;
  static_assert(Config::kTokens % kRowsPerPass == 0, "every pass is full");

 public:
  FIPS_DEVICE_MEMBER StageLoader(const MmTask& task, const MmTile& tile)
      : task_(task),
        tile_(tile),
        row_(thread_index() / kChunks),
        chunk_(thread_index() % kChunks),
        tokens_(static_cast<int>(min_of(Config::kTokens, task.tokens - tile.token))),
        x_row_(static_cast<const T*>(task.x) + (tile.token + row_) * task.x_stride),
        position_(chunk_ * Config::kChunk),
        block_(block_at(task, tile, position_)) {}

  // Starts the next stage; it completes after cp_async_wait and a barrier.
  FIPS_DEVICE_MEMBER void start(unsigned char* stage) {
    const BlockRef block = block_;
    const int offset = offset_in_block(task_, position_);
    const int first = position_ - chunk_ * Config::kChunk;
    position_ += Config::kReduce;
    block_ = block_at(task_, tile_, position_);
    stage_x(block, offset, stage);
    unsigned char* w_tile = stage + Config::kXBytes;
    if constexpr (Config::kBitmap) {
      stage_w_bitmap<Config, kThreads>(task_, tile_, first / Config::kReduce, w_tile);
    } else if constexpr (Config::kTransposed) {
      stage_w_columns(block, first, w_tile);
    } else {
      stage_w_rows(block, offset, w_tile);
    }
  }

 private:
  FIPS_DEVICE_MEMBER int target_of(int pass) const {
    return swizzled_offset<kChunks>(pass * kRowsPerPass + row_, chunk_);
  }

  FIPS_DEVICE_MEMBER void stage_x(const BlockRef& block, int offset, unsigned char* x_tile) const {
    const int feature = block.feature + offset;
    const int valid = block.id < 0 ? 0 : elements_below(feature, task_.in_features, Config::kChunk);
    const T* x = x_row_ + feature;
    const int64_t step = kRowsPerPass * task_.x_stride;
    copy_chunks<Config::kTokens / kRowsPerPass>(task_.wide_x, [&](int pass) {
      const int count = pass * kRowsPerPass + row_ < tokens_ ? valid : 0;
      const T* source = count > 0 ? x + pass * step : static_cast<const T*>(task_.x);
      return Copy{x_tile + target_of(pass), source, count};
    });
  }

  // Rows of outputs, reduction contiguous.
  FIPS_DEVICE_MEMBER void stage_w_rows(const BlockRef& block, int offset,
                                       unsigned char* w_tile) const {
    const T* values = static_cast<const T*>(task_.values);
    const T* w = values + block.id * int64_t{task_.slots} + (row_ << task_.k_shift) + offset;
    copy_chunks<Config::kOut / kRowsPerPass>(task_.wide_values, [&](int pass) {
      const T* source = block.id < 0 ? values : w + (pass * kRowsPerPass << task_.k_shift);
      return Copy{w_tile + target_of(pass), source, block.id < 0 ? 0 : Config::kChunk};
    });
  }

  // Rows of the reduction from position `first` on, outputs contiguous.
  FIPS_DEVICE_MEMBER void stage_w_columns(const BlockRef& block, int first,
                                          unsigned char* w_tile) const {
    constexpr int kOutChunks = Config::kWChunks, kPassRows = kThreads / kOutChunks;
    const T* values = static_cast<const T*>(task_.values);
    const int row = thread_index() / kOutChunks, chunk = thread_index() % kOutChunks;
    const bool one_block = 1 << task_.reduce_shift >= Config::kReduce;  // holds the whole stage
    copy_chunks<Config::kReduce / kPassRows>(task_.wide_values, [&](int pass) {
      const int position = first + pass * kPassRows + row;
      const BlockRef at = one_block ? block : block_at(task_, tile_, position);
      const T* source = values + at.id * int64_t{task_.slots} +
                        (offset_in_block(task_, position) << task_.k_shift) +
                        chunk * Config::kChunk;
      return Copy{w_tile + swizzled_offset<kOutChunks>(pass * kPassRows + row, chunk),
                  at.id < 0 ? values : source, at.id < 0 ? 0 : Config::kChunk};
    });
  }

  struct Copy {
    unsigned char* target;
    const T* source;
    int count;
  };

  // The copies copy_of(0 .. kPasses - 1), asynchronous where memory is aligned.
  template <int kPasses, class CopyOf>
  FIPS_DEVICE_MEMBER static void copy_chunks(bool wide, const CopyOf& copy_of) {
    if (wide) {
      FIPS_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const Copy copy = copy_of(pass);
        cp_async_16(shared_address(copy.target), copy.source,
                    copy.count * static_cast<int>(sizeof(T)));
      }
      return;
    }
    FIPS_UNROLL_BY(1)
    for (int pass = 0; pass < kPasses; ++pass) {
      const Copy copy = copy_of(pass);
      *reinterpret_cast<Chunk<T>*>(copy.target) = load_chunk_narrow(copy.source, copy.count);
    }
  }

  const MmTask& task_;
  const MmTile& tile_;
  const int row_, chunk_;  // of this thread in a pass over rows of kChunks chunks
  const int tokens_;       // in the tile
  const T* const x_row_;
  int position_;    // of this thread's chunk on the reduction axis, in the next stage
  BlockRef block_;  // there
};

// Runs `compute(stage)` over the whole reduction with kStages - 1 stages in flight. One barrier a
// step is enough: the slot refilled at a step was read at the previous one, before that step's
// barrier.
template <class Config, int kThreads, class Compute>
FIPS_DEVICE void pipeline(const MmTask& task, const MmTile& tile, unsigned char* shared,
                          const Compute& compute) {
  constexpr int kAhead = Config::kStages - 1;
  const int length = (tile.range.end - tile.range.begin) << task.reduce_shift;
  const int steps = (length + Config::kReduce - 1) / Config::kReduce;
  StageLoader<Config, kThreads> loader(task, tile);
  int slot = 1, refill = 0;  // slot comes round to 0 at step 0
  for (int step = -kAhead; step < steps; ++step) {
    if (step >= 0) {
      cp_async_wait<kAhead - 1>();
      block_barrier();
    }
    if (step + kAhead < steps) {
      loader.start(shared + refill * Config::kTileBytes);
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
