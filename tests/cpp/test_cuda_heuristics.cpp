#include <gtest/gtest.h>

#include "kernels/cuda/block_sparse_mm_heuristics.h"

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

}  // namespace
}  // namespace fips::cuda
