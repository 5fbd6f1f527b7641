// Index arithmetic of the CUDA kernels as plain host/device functions, so that every map a kernel
// relies on can be checked on any machine (tests/cpp/test_cuda_indexing.cpp).
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/types.h"

namespace fips::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kChunkBytes = 16;   // the widest access of one thread, and of cp.async
inline constexpr int kStageBytes = 128;  // bytes along the reduction that one pipeline stage covers

FIPS_INLINE FIPS_HOST_DEVICE int log2_of_edge(int32_t edge) {
  int shift = 0;
  while ((int32_t{1} << shift) < edge) {
    ++shift;
  }
  return shift;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// ---- shared memory
// -------------------------------------------------------------------------------

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of kChunks chunks per row. The chunk
// index is permuted by the row so that eight consecutive rows at one chunk, which is what ldmatrix
// reads, and one row at eight consecutive chunks, which is what cp.async writes, touch all 32 banks
// exactly once.
template <int kChunks>
FIPS_INLINE FIPS_HOST_DEVICE int swizzled_offset(int row, int chunk) {
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0, "a power of two");
  constexpr int kRowsPerLine = kChunks >= 8 ? 1 : 8 / kChunks;  // rows in one 128-byte line
  constexpr int kMask = (kChunks >= 8 ? 8 : kChunks) - 1;
  return (row * kChunks + (chunk ^ ((row / kRowsPerLine) & kMask))) * kChunkBytes;
}

// ---- mma.sync.m16n8k16 fragments (PTX ISA, "Matrix fragments for mma.m16n8k16")
// ------------------

struct Coord {
  int row;
  int col;
};

// Which 8x8 row of a 16x16 row-major A tile lane `lane` addresses in ldmatrix.x4: {row, 16-byte
// chunk}.
FIPS_INLINE FIPS_HOST_DEVICE Coord ldmatrix_a(int lane) { return {lane & 15, lane >> 4}; }

// The same for A stored [k][row]; transposing ldmatrix.x4: {k, row chunk}.
FIPS_INLINE FIPS_HOST_DEVICE Coord ldmatrix_a_transposed(int lane) {
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}

// The same for B (16 k x 16 n, two mma's worth) stored [n][k]; non-transposing ldmatrix.x4: {n, k
// chunk}.
FIPS_INLINE FIPS_HOST_DEVICE Coord ldmatrix_b(int lane) {
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}

// The same for B stored [k][n]; transposing ldmatrix.x4: {k, n chunk}.
FIPS_INLINE FIPS_HOST_DEVICE Coord ldmatrix_b_transposed(int lane) {
  return {lane & 15, lane >> 4};
}

// Element {row, column} of the 16x8 accumulator that register `index` (0..3) of `lane` holds.
FIPS_INLINE FIPS_HOST_DEVICE Coord accumulator_coord(int lane, int index) {
  return {(lane >> 2) + ((index >> 1) << 3), ((lane & 3) << 1) + (index & 1)};
}

// ---- the grid
// ------------------------------------------------------------------------------------

struct TileIndex {
  int64_t token_tile;
  int64_t out_block;
};

inline constexpr int64_t kRasterGroup = 8;

// Blocks of a grid run roughly in order. Walking kRasterGroup token tiles together keeps both the
// tokens and the slice's blocks of the running wave in L2. Int: wide enough for the count of tiles.
template <class Int>
FIPS_INLINE FIPS_HOST_DEVICE TileIndex raster_tile(Int index, Int token_tiles, Int out_blocks) {
  constexpr Int kGroup = static_cast<Int>(kRasterGroup);
  const Int first = index / (kGroup * out_blocks) * kGroup;
  const Int width = token_tiles - first < kGroup ? token_tiles - first : kGroup;
  const Int within = index - first * out_blocks;
  return {first + within % width, within / width};
}

FIPS_INLINE FIPS_HOST_DEVICE TileIndex tile_of(int64_t index, int64_t token_tiles,
                                               int64_t out_blocks) {
  return raster_tile<int64_t>(index, token_tiles, out_blocks);
}

// ---- walking the stored blocks of one output block
// ------------------------------------------------

// The stored blocks that feed one output block, laid end to end, form one reduction axis: position
// `q` lies in entry q >> shift of the index list, at q & (edge - 1) inside that block. 32 bits are
// enough for it: a block row or column holds each block once, so the axis is no longer than the
// padded input.
struct BlockRange {
  int begin;
  int end;
};

// Room for padding and for the pipeline to look ahead of the end.
inline constexpr int64_t kMaxInFeatures = 0x7fffffff - 4096;

// The device cannot raise an error for a broken index, so a range is clamped to what a sound one
// can be.
FIPS_INLINE FIPS_HOST_DEVICE BlockRange clamp_range(int begin, int end, int num_blocks,
                                                    int reduce_blocks) {
  const int64_t first = max_of(0, min_of(begin, num_blocks));
  const int64_t last = min_of(max_of(first, min_of(end, num_blocks)), first + reduce_blocks);
  return {static_cast<int>(first), static_cast<int>(last)};
}

struct BlockRef {
  int id;       // which stored block; -1: none, read as zeros
  int feature;  // first input feature of the block
};

// One entry of the index list. An entry out of bounds is skipped rather than followed.
FIPS_INLINE FIPS_HOST_DEVICE BlockRef checked_ref(int id, int reduce_block, int num_blocks,
                                                  int reduce_blocks, int shift) {
  const bool valid =
      id >= 0 && id < num_blocks && reduce_block >= 0 && reduce_block < reduce_blocks;
  return {valid ? id : -1, valid ? reduce_block << shift : 0};
}

// How many of `count` elements from `first` on lie below `limit`.
FIPS_INLINE FIPS_HOST_DEVICE int elements_below(int first, int limit, int count) {
  const int left = limit - first;
  return left < 0 ? 0 : left < count ? left : count;
}

}  // namespace fips::cuda
