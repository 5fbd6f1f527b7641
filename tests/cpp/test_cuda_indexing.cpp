// The maps that the CUDA kernels rely on, against the layouts that the PTX ISA documents.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {
namespace {

template <int kChunks>
void check_swizzle() {
  constexpr int kRows = 64;
  std::set<int> offsets;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int offset = swizzled_offset<kChunks>(row, chunk);
      EXPECT_EQ(offset % kChunkBytes, 0);
      EXPECT_LT(offset, kRows * kChunks * kChunkBytes);
      offsets.insert(offset);
    }
  }
  EXPECT_EQ(offsets.size(), size_t{kRows} * kChunks) << "two chunks share a place";
  for (int first = 0; first < kRows; first += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      std::set<int> groups;  // of four banks
      for (int row = first; row < first + 8; ++row) {
        groups.insert(swizzled_offset<kChunks>(row, chunk) / kChunkBytes % 8);
      }
      EXPECT_EQ(groups.size(), 8u)
          << kChunks << " chunks: ldmatrix would conflict at row " << first;
    }
  }
}

TEST(CudaIndexing, SwizzleIsABijectionWithoutBankConflicts) {
  check_swizzle<2>();
  check_swizzle<4>();
  check_swizzle<8>();
  check_swizzle<16>();
  check_swizzle<32>();
}

// ldmatrix.x4 on a 16x16 tile of {row, column}: register m of lane l holds the elements that row l
// / 4 of matrix m (whose row addresses come from lanes 8m...) has at columns 2 (l % 4) and the
// next; transposing swaps the two inside the matrix.
template <Coord (*kAddress)(int)>
Coord loaded(bool transpose, int lane, int m, int half) {
  const int outer = lane / 4, inner = lane % 4 * 2 + half;
  const Coord at = kAddress(m * 8 + (transpose ? inner : outer));
  return {at.row, at.col * 8 + (transpose ? outer : inner)};
}

TEST(CudaIndexing, LoadedFragmentsAreWhatTheInstructionWants) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        // A: registers 0..3 hold rows group, group + 8, group, group + 8 at k pair, pair, pair + 8,
        // pair + 8.
        const Coord a = loaded<ldmatrix_a>(false, lane, r, half);
        EXPECT_EQ(a.row, group + r % 2 * 8);
        EXPECT_EQ(a.col, pair + half + r / 2 * 8);
        // B: {b0, b1} of columns group, then {b0, b1} of columns group + 8; b1 holds k + 8.
        const Coord b = loaded<ldmatrix_b>(false, lane, r, half);  // stored [n][k]
        EXPECT_EQ(b.row, group + r / 2 * 8);
        EXPECT_EQ(b.col, pair + half + r % 2 * 8);
        const Coord t = loaded<ldmatrix_b_transposed>(true, lane, r, half);  // stored [k][n]
        EXPECT_EQ(t.row, pair + half + r % 2 * 8);
        EXPECT_EQ(t.col, group + r / 2 * 8);
      }
      const Coord c = accumulator_coord(lane, r);
      EXPECT_EQ(c.row, group + r / 2 * 8);
      EXPECT_EQ(c.col, pair + r % 2);
    }
  }
}

TEST(CudaIndexing, EveryTileIsVisitedOnce) {
  for (const int64_t token_tiles : {1, 7, 8, 9, 33}) {
    for (const int64_t out_blocks : {1, 5, 64}) {
      std::set<std::pair<int64_t, int64_t>> seen;
      for (int64_t i = 0; i < token_tiles * out_blocks; ++i) {
        const TileIndex tile = tile_of(i, token_tiles, out_blocks);
        EXPECT_TRUE(tile.token_tile >= 0 && tile.token_tile < token_tiles);
        EXPECT_TRUE(tile.out_block >= 0 && tile.out_block < out_blocks);
        seen.insert({tile.token_tile, tile.out_block});
      }
      EXPECT_EQ(seen.size(), static_cast<size_t>(token_tiles * out_blocks));
    }
  }
}

TEST(CudaIndexing, RangesAreClampedIntoTheIndex) {
  constexpr int kFar = 0x7fffffff;
  for (const int begin : {-kFar - 1, -1, 0, 3, 10, 11, kFar}) {
    for (const int end : {-kFar - 1, -1, 0, 3, 10, 11, kFar}) {
      const BlockRange range = clamp_range(begin, end, 10, 6);
      EXPECT_TRUE(0 <= range.begin && range.begin <= range.end && range.end <= 10);
      EXPECT_LE(range.end - range.begin, 6);
    }
  }
  const BlockRange sound = clamp_range(2, 7, 10, 6);
  EXPECT_EQ(sound.begin, 2);
  EXPECT_EQ(sound.end, 7);
}

TEST(CudaIndexing, BrokenEntriesAreSkipped) {
  EXPECT_EQ(checked_ref(3, 2, 4, 5, 4).id, 3);
  EXPECT_EQ(checked_ref(3, 2, 4, 5, 4).feature, 32);
  EXPECT_EQ(checked_ref(4, 2, 4, 5, 4).id, -1);
  EXPECT_EQ(checked_ref(-1, 2, 4, 5, 4).id, -1);
  EXPECT_EQ(checked_ref(3, 5, 4, 5, 4).id, -1);
  EXPECT_EQ(checked_ref(3, -7, 4, 5, 4).id, -1);
}

TEST(CudaIndexing, RaggedEdge) {
  EXPECT_EQ(elements_below(0, 100, 8), 8);
  EXPECT_EQ(elements_below(96, 100, 8), 4);
  EXPECT_EQ(elements_below(104, 100, 8), 0);
}

TEST(CudaIndexing, TaskResolvesTheDirection) {
  BlockSparseMmParams params;
  params.v.rows = 100;
  params.v.cols = 70;
  params.v.bk = 32;
  params.v.bn = 16;
  params.x_stride = 104;
  params.v.dtype = DType::kBFloat16;
  const MmTask forward = make_task(params);
  EXPECT_EQ(forward.out_blocks, 5);
  EXPECT_EQ(forward.reduce_blocks, 4);
  EXPECT_EQ(forward.reduce_shift, 5);
  EXPECT_EQ(forward.in_features, 100);
  EXPECT_TRUE(forward.wide_x);
  params.transpose = true;
  params.x_stride = 71;
  const MmTask transposed = make_task(params);
  EXPECT_EQ(transposed.out_blocks, 4);
  EXPECT_EQ(transposed.reduce_blocks, 5);
  EXPECT_EQ(transposed.reduce_shift, 4);
  EXPECT_EQ(transposed.k_shift, 5);
  EXPECT_FALSE(transposed.wide_x);
}

TEST(CudaIndexing, TooLargeASliceIsRefused) {
  BlockSparseMmParams params;
  params.v.bk = params.v.bn = 128;
  params.v.rows = int64_t{1} << 31;
  EXPECT_THROW(make_task(params), Error);
}

}  // namespace
}  // namespace fips::cuda
