#include <gtest/gtest.h>

#include "kernels/cuda/block_sparse_mm_heuristics.h"
#include "kernels/cuda/planner.h"

namespace fips::cuda {
namespace {

constexpr int kH200 = 132;

int tile(int64_t tokens, int64_t out_blocks, DType dtype = DType::kBFloat16, bool bitmap = false) {
  return choose_token_tile({tokens, out_blocks, dtype, bitmap, kH200});
}

TEST(CudaHeuristics, DecodeUsesTheLowTile) {
  for (const int64_t tokens : {0, 1, 8, 16}) {
    EXPECT_EQ(tile(tokens, 112), 16);
  }
}

TEST(CudaHeuristics, PrefillUsesTheTallTile) {
  EXPECT_EQ(tile(4096, 64), 128);
  EXPECT_EQ(tile(12608, 48), 128);
}

TEST(CudaHeuristics, FewTilesAreCutSmaller) {
  EXPECT_EQ(tile(512, 16), 64);  // 64 tall tiles would leave half the multiprocessors idle
}

TEST(CudaHeuristics, NeverTallerThanTheKernelsThatExist) {
  for (const int64_t tokens : {1, 17, 64, 100, 1000, 100000}) {
    for (const int64_t out_blocks : {1, 16, 1000}) {
      EXPECT_LE(tile(tokens, out_blocks, DType::kFloat32), 64);
      EXPECT_LE(tile(tokens, out_blocks, DType::kBFloat16, true), 64);
    }
  }
}

TEST(CudaHeuristics, MoreTokensNeverShrinkTheTile) {
  for (const int64_t out_blocks : {1, 16, 64, 448}) {
    int last = 0;
    for (int64_t tokens = 1; tokens <= 8192; tokens *= 2) {
      const int now = tile(tokens, out_blocks);
      EXPECT_GE(now, last) << tokens << " tokens, " << out_blocks << " output blocks";
      last = now;
    }
  }
}

TEST(CudaHeuristics, MoreTilesAreAskedForWhereTheTableSaysSo) {
  EXPECT_EQ(choose_token_tile({1024, 64, DType::kBFloat16, false, kH200, 1.0}), 128);  // 512 tiles
  EXPECT_EQ(choose_token_tile({1024, 64, DType::kBFloat16, false, kH200, 4.0}), 64);
}

TEST(CudaTuning, AnUnlistedGpuTakesTheFirstEntry) {
  constexpr Tuning table[] = {{0, 64, 64, 0.5, 0.2, 1.0}, {90, 32, 16, 0.7, 0.3, 2.0}};
  EXPECT_EQ(tuning_of(table, 90).dense_tokens, 32);
  EXPECT_EQ(tuning_of(table, 80).dense_tokens, 64);
  EXPECT_EQ(kTuning[0].capability, 0);
}

MmShape shape(int64_t tokens, double density, bool bitmap = false, DType dtype = DType::kBFloat16) {
  return {tokens, static_cast<int64_t>(density * 1024 * 1024), 1024, 1024, dtype, bitmap};
}

TEST(CudaPlanner, FollowsItsTable) {
  constexpr Tuning tuning{90, 32, 128, 0.5, 0.2, 1.0};
  EXPECT_EQ(choose_mm_path(shape(31, 0.9), tuning), MmPath::kSparse);
  EXPECT_EQ(choose_mm_path(shape(32, 0.9), tuning), MmPath::kDensified);
  EXPECT_EQ(choose_mm_path(shape(4096, 0.49), tuning), MmPath::kSparse);
  EXPECT_EQ(choose_mm_path(shape(127, 1.0, true), tuning), MmPath::kSparse);
  EXPECT_EQ(choose_mm_path(shape(128, 1.0, true), tuning), MmPath::kDensified);
  EXPECT_EQ(choose_sddmm_path(shape(4096, 0.19), tuning), MmPath::kSparse);
  EXPECT_EQ(choose_sddmm_path(shape(4096, 0.21), tuning), MmPath::kDensified);
}

TEST(CudaPlanner, SamplesOnlyWhereThereIsAKernel) {
  EXPECT_EQ(choose_sddmm_path(shape(4096, 0.1, true), kTuning[0]), MmPath::kDensified);
  EXPECT_EQ(choose_sddmm_path(shape(4096, 0.1, false, DType::kFloat32), kTuning[0]),
            MmPath::kDensified);
}

}  // namespace
}  // namespace fips::cuda
