// The CUDA kernel of block_sparse_sddmm, emulated, against float64 sums.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "elements.h"
#include "kernels/cuda/block_sparse_sddmm.h"
#include "kernels/cuda/block_sparse_sddmm_task.h"
#include "kernels/cuda/emulation.h"
#include "slices.h"

namespace fips::cuda {
namespace {

using fips::testing::DenseSlice;
using fips::testing::Elements;
using fips::testing::random_dense;
using fips::testing::random_vector;

struct Case {
  int64_t rows = 150, cols = 170, tokens = 70;
  int bk = 32, bn = 16;
  DType dtype = DType::kBFloat16;
  double density = 0.001;  // of elements: a good part of the blocks
  int64_t stride_excess = 0;
  bool accumulate = false;
  int sm_count = 4;
};

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        slice(fips::testing::pack(random_dense(c.rows, c.cols, c.density, 1), c.bk, c.bn, false)),
        a_stride(c.rows + c.stride_excess),
        b_stride(c.cols + c.stride_excess),
        a(random_vector(c.tokens * a_stride, 2), c.dtype),
        b(random_vector(c.tokens * b_stride, 3), c.dtype),
        out(slice.num_blocks() * c.bk * c.bn, c.accumulate ? 0.5f : std::nanf("")) {}

  BlockSparseSddmmParams params() {
    BlockSparseSddmmParams p;
    p.v = slice.view(c.dtype);
    p.a = a.data();
    p.a_stride = a_stride;
    p.b = b.data();
    p.b_stride = b_stride;
    p.tokens = c.tokens;
    p.out = out.data();
    p.accumulate = c.accumulate;
    return p;
  }

  void run(bool reverse = false) {
    emulation::settings() = {{c.sm_count, 80, 227 * 1024}, reverse};
    const BlockSparseSddmmParams p = params();
    std::vector<char> workspace(block_sparse_sddmm_workspace(p));
    block_sparse_sddmm(p, workspace.data(), nullptr);
  }

  // The exact value of slot (j, k) of stored block `id` in block column `column`.
  double expected(int64_t id, int64_t column, int j, int k) const {
    const int64_t n = column * c.bn + j, r = int64_t{slice.row_idx[id]} * c.bk + k;
    double sum = c.accumulate ? 0.5 : 0.0;
    for (int64_t t = 0; n < c.cols && r < c.rows && t < c.tokens; ++t) {
      sum += a[t * a_stride + r] * b[t * b_stride + n];
    }
    return sum;
  }

  void expect_exact() const {
    const double allowed = 1e-5 * (1 + std::sqrt(static_cast<double>(c.tokens)));
    for (size_t column = 0; column + 1 < slice.col_ptr.size(); ++column) {
      for (int id = slice.col_ptr[column]; id < slice.col_ptr[column + 1]; ++id) {
        for (int slot = 0; slot < c.bk * c.bn; ++slot) {
          const double want = expected(id, static_cast<int64_t>(column), slot / c.bk, slot % c.bk);
          ASSERT_NEAR(out[id * c.bk * c.bn + slot], want, allowed) << id << ", " << slot;
        }
      }
    }
  }

  Case c;
  PackedSlice slice;
  int64_t a_stride, b_stride;
  Elements a, b;
  std::vector<float> out;
};

void expect_exact(const Case& c, bool reverse = false) {
  SCOPED_TRACE(::testing::Message() << c.bk << "x" << c.bn << " tokens " << c.tokens);
  Problem problem(c);
  problem.run(reverse);
  problem.expect_exact();
}

class SddmmBlock : public ::testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(SddmmBlock, MatchesTheExactSums) {
  Case c;
  std::tie(c.bk, c.bn) = GetParam();
  expect_exact(c);
}

INSTANTIATE_TEST_SUITE_P(CudaSddmm, SddmmBlock,
                         ::testing::Combine(::testing::Values(16, 32, 64, 128),
                                            ::testing::Values(16, 32, 64, 128)));

TEST(CudaSddmm, RangesOfTokensAreAdded) {
  Case c;
  c.rows = c.cols = 60;
  c.tokens = 1100;
  c.sm_count = 132;
  for (const bool accumulate : {false, true}) {
    c.accumulate = accumulate;
    expect_exact(c);
    expect_exact(c, true);
  }
}

TEST(CudaSddmm, StridedUnalignedAndFloat16) {
  for (const int64_t excess : {1, 8}) {
    Case c;
    c.stride_excess = excess;
    expect_exact(c);
    c.dtype = DType::kFloat16;
    expect_exact(c, true);
  }
}

TEST(CudaSddmm, NoTokensAndNoBlocks) {
  Case c;
  c.tokens = 0;
  expect_exact(c);
  c.accumulate = true;
  expect_exact(c);
  c.density = 0;
  Problem empty(c);
  empty.run();
  EXPECT_TRUE(empty.out.empty());
}

// Memory checkers watch the accesses.
TEST(CudaSddmm, BrokenIndicesStayInBounds) {
  Problem problem(Case{});
  constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
  problem.slice.row_idx[0] = kFar;
  problem.slice.row_idx[1] = -7;
  problem.slice.col_ptr[1] = kFar;
  problem.slice.col_ptr[0] = -kFar;
  problem.slice.col_ptr.back() = kFar;
  problem.run();
  EXPECT_EQ(problem.out.size(), static_cast<size_t>(problem.slice.num_blocks() * 32 * 16));
}

TEST(SddmmSplit, FillsTheChipWithoutTinyRanges) {
  // 36 super-tiles of 128 x 128 on 132 multiprocessors.
  const SddmmSplit few = split_tokens(12608, 36, 128 * 128, 132);
  EXPECT_EQ(few.splits, 8);
  EXPECT_GE(few.splits * few.split_tokens, 12608);
  EXPECT_EQ(few.split_tokens % kSddmmStepTokens, 0);
  EXPECT_EQ(split_tokens(100, 36, 128 * 128, 132).splits, 1);
  EXPECT_EQ(split_tokens(100000, 4000, 128 * 128, 132).splits, 1);
  EXPECT_EQ(split_tokens(0, 4000, 128 * 128, 132).splits, 1);
  // benchmarks/gpu_every_kernel.py: 5 blocks of 64 x 64, summed at once and in ranges.
  EXPECT_EQ(split_tokens(600, 5, 64 * 64, 132).splits, 1);
  EXPECT_EQ(split_tokens(1100, 5, 64 * 64, 132).splits, 2);
  // Ranges cover all tokens and none is empty.
  for (int64_t tokens = 1; tokens < 5000; tokens += 37) {
    const SddmmSplit split = split_tokens(tokens, 3, 256, 132);
    EXPECT_GE(split.splits * split.split_tokens, tokens);
    EXPECT_LT((split.splits - 1) * split.split_tokens, tokens);
  }
}

}  // namespace
}  // namespace fips::cuda
