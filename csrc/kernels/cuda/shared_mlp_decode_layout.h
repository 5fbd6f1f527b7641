// Index maps of shared_mlp_decode as plain host/device functions: how a stage is split over thread
// blocks and warps, and where a tile of weights lies in shared memory.
//
// A stage is cut into tiles of 16 outputs. Every thread block gets a range of consecutive tiles, so
// no sum crosses thread blocks; its warps share the reduction of each tile in steps of 128 bytes
// (64 or 32 positions). A tile step is thus 16 outputs x 128 bytes = 2 KiB of weights, for every
// element type and in both directions.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/types.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
inline constexpr int kDecodeOut = 16;       // outputs of a tile
inline constexpr int kDecodeGroup = 16;     // positions that share a stored block: the least edge
inline constexpr int kDecodeMaxGroups = 4;  // of a step
inline constexpr int kDecodeStepBytes = kDecodeOut * kStageBytes;

template <class T>
struct DecodeStep {
  static constexpr int kReduce = kStageBytes / static_cast<int>(sizeof(T));
  static constexpr int kGroups = kReduce / kDecodeGroup;
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kReduce / kChunk;        // 8, along the reduction
  static constexpr int kOutChunks = kDecodeOut / kChunk;  // 2 or 4, along the outputs
};

// ---- the split of a stage
// ------------------------------------------------------------------------

struct TileRange {
  int64_t begin, end;
};

// Block `block` of `blocks` works on these of a stage's `tiles`; shares differ by one at most, and
// neighbouring tiles, which read the same features, stay together.
FIPS_INLINE FIPS_HOST_DEVICE TileRange decode_tiles(int64_t tiles, int64_t block, int64_t blocks) {
  return {block * tiles / blocks, (block + 1) * tiles / blocks};
}

// A thread block deals its steps to the warps in turn, on from tile to tile: after `before` steps,
// `warp` takes this step of the next tile first, and every kDecodeWarps-th from there.
FIPS_INLINE FIPS_HOST_DEVICE int first_step(int warp, int before) {
  return (warp - before) & (kDecodeWarps - 1);
}

// ---- a tile step in shared memory
// ----------------------------------------------------------------

// Stored with the reduction contiguous: [16 outputs][8 chunks]. Both eight consecutive rows at one
// chunk and two consecutive rows at four chunks, which is how the products read, touch every bank
// once.
FIPS_INLINE FIPS_HOST_DEVICE int row_tile_offset(int out, int chunk) {
  const int reversed = (out & 1) << 2 | (out & 2) | (out >> 2 & 1);
  return (out * 8 + (chunk ^ reversed)) * kChunkBytes;
}

// Stored with the outputs contiguous: [positions][kOutChunks chunks]. Rows 0, 1, 8, 9, 16, 17, 24,
// 25 (plus 2, 4 or 6), which one transposing ldmatrix reads for 16-bit elements, touch every bank
// once.
template <int kOutChunks>
FIPS_INLINE FIPS_HOST_DEVICE int column_tile_offset(int position, int chunk) {
  if (kOutChunks != 2) {
    return (position * kOutChunks + chunk) * kChunkBytes;
  }
  const int row = position ^ (position >> 3 & 3);
  return (row * 2 + (chunk ^ (position >> 3 & 1))) * kChunkBytes;
}

// ---- fragments of 16-bit elements
// ----------------------------------------------------------------
//
// Sums do not care about the order of the positions, so a lane takes them where 16-byte accesses
// find them: lane 4 g + q holds positions 8 q ... 8 q + 7 of a span of 32. Words 2 m and 2 m + 1 of
// them are its share of instruction m (0 or 1) of the span, for weights and tokens alike.
inline constexpr int kDecodeSpan = 32;

// {position in the span, chunk of outputs} of the row that `lane` addresses in the transposing
// ldmatrix.x4 for instruction `m`.
FIPS_INLINE FIPS_HOST_DEVICE Coord column_tile_row(int lane, int m) {
  const int row = lane & 7, matrix = lane >> 3;
  return {(row >> 1) * 8 + m * 4 + (matrix >> 1) * 2 + (row & 1), matrix & 1};
}

}  // namespace fips::cuda
