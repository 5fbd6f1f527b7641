// Index maps of shared_mlp_decode as plain host/device functions: how a stage is split over thread
// blocks and warps, and where a tile of weights lies in shared memory.
//
// A stage is cut into tiles of 16, 32 or 64 outputs, and a tile of a stage with few of them into
// shares of its reduction: a unit is one share of one tile. A thread block sums its units one after
// another; its warps deal the reduction out in steps of up to 4 KiB of weights, each of them whole
// 128-byte lines where the block edges allow it:
//   row step     weights stored with the reduction contiguous (V of z V, U of w U^T):
//                [up to 32 outputs][128 bytes of positions]
//   column step  weights stored with the outputs contiguous (U of x U, V of h V^T):
//                [32 positions][up to 128 bytes of outputs]
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/types.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
inline constexpr int kDecodeStepBytes = 4096;
inline constexpr int kDecodeGroup = 16;     // positions that share a stored block: the least edge
inline constexpr int kDecodeMaxGroups = 4;  // of a step
inline constexpr int kRowStepOut = 32;
inline constexpr int kColumnStepReduce = 32;

template <class T>
struct DecodeStep {
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowReduce = kStageBytes / static_cast<int>(sizeof(T));
  static constexpr int kGroupChunks = kDecodeGroup / kChunk;

  FIPS_INLINE FIPS_HOST_DEVICE int reduce(bool columns) {
    return columns ? kColumnStepReduce : kRowReduce;
  }
};

inline int widest_tile(bool columns, int64_t element_bytes) {
  return columns ? static_cast<int>(kStageBytes / element_bytes) : kRowStepOut;
}

// ---- the split of a stage
// ------------------------------------------------------------------------

struct StageSplit {
  int out_tile;  // outputs of a tile
  int shares;    // of each tile's reduction; more than one only if every unit has its own block
  int units;
  int whole, rest;  // the first `rest` blocks have whole + 1 units, the others `whole`
};

// `steps`: of a tile's reduction, on average. Wide tiles read in long lines and share the features
// among more outputs; narrow ones spread over the blocks more evenly, which has to be worth it.
inline StageSplit choose_split(int64_t outputs, int widest, int64_t steps, int64_t blocks) {
  StageSplit best{};
  double least = 0;
  for (int tile = widest; tile >= kDecodeGroup; tile /= 2) {
    const int64_t tiles = ceil_div(outputs, tile);
    const int64_t shares = tiles == 0 ? 1 : max_of(1, min_of(blocks / tiles, steps / kDecodeWarps));
    const double longest = static_cast<double>(ceil_div(tiles, blocks) * tile) / shares;
    if (tile == widest || longest < 0.8 * least) {
      const int64_t units = tiles * shares;
      best = {tile, static_cast<int>(shares), static_cast<int>(units),
              static_cast<int>(units / blocks), static_cast<int>(units % blocks)};
      least = longest;
    }
  }
  return best;
}

struct WorkRange {
  int begin, end;
};

// The units of block `block`: neighbouring tiles, which read the same features, stay together.
FIPS_INLINE FIPS_HOST_DEVICE WorkRange units_of(const StageSplit& split, int block) {
  const int begin = block * split.whole + static_cast<int>(min_of(block, split.rest));
  return {begin, begin + split.whole + (block < split.rest ? 1 : 0)};
}

// The steps of a reduction that share `share` of `shares` adds.
FIPS_INLINE FIPS_HOST_DEVICE WorkRange steps_of(int64_t steps, int share, int shares) {
  return {static_cast<int>(steps * share / shares), static_cast<int>(steps * (share + 1) / shares)};
}

// A thread block deals its steps to the warps in turn, on from tile to tile: after `before` steps,
// `warp` takes this step of the next ones first, and every kDecodeWarps-th from there.
FIPS_INLINE FIPS_HOST_DEVICE int first_step(int warp, int before) {
  return (warp - before) & (kDecodeWarps - 1);
}

// ---- a step in shared memory
// ---------------------------------------------------------------------

// Row step, [outputs][8 chunks]. Both eight consecutive rows at one chunk and two consecutive rows
// at four chunks, which is how the products read, touch every bank once.
FIPS_INLINE FIPS_HOST_DEVICE int row_step_offset(int out, int chunk) {
  const int reversed = (out & 1) << 2 | (out & 2) | (out >> 2 & 1);
  return (out * 8 + (chunk ^ reversed)) * kChunkBytes;
}

// Column step, [32 positions][2, 4 or 8 chunks]; chunks_shift: log2 of the chunks. Rows 0, 1, 8, 9,
// 16, 17, 24, 25 (plus 2, 4 or 6) at one chunk, which one transposing ldmatrix reads for 16-bit
// elements, touch every bank once.
FIPS_INLINE FIPS_HOST_DEVICE int column_step_offset(int position, int chunk, int chunks_shift) {
  const int high = position >> 3 & 3;
  const int row = chunks_shift == 1 ? position ^ high : position;
  const int swap = chunks_shift == 1   ? high & 1
                   : chunks_shift == 2 ? high
                                       : high << 1 | (position & 1);
  return ((row << chunks_shift) + (chunk ^ swap)) * kChunkBytes;
}

// ---- fragments of 16-bit elements
// ----------------------------------------------------------------
//
// Sums do not care about the order of the positions, so a lane takes them where 16-byte accesses
// find them: lane 4 g + q holds positions 8 q ... 8 q + 7 of a span of 32. Words 2 m and 2 m + 1 of
// them are its share of instruction m (0 or 1) of the span, for weights and tokens alike.
inline constexpr int kDecodeSpan = 32;

// {position in the span, chunk of outputs} of the row that `lane` addresses in the transposing
// ldmatrix.x4 for instruction `m` of 16 outputs.
FIPS_INLINE FIPS_HOST_DEVICE Coord column_step_row(int lane, int m) {
  const int row = lane & 7, matrix = lane >> 3;
  return {(row >> 1) * 8 + m * 4 + (matrix >> 1) * 2 + (row & 1), matrix & 1};
}

}  // namespace fips::cuda
