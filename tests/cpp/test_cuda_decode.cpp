// Runs the decoding kernel of the shared MLP, from its own source, on the CPU
// (csrc/kernels/cuda/emulation.h: all blocks of the grid in turn) against float64 products of dense
// matrices.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "decode_problem.h"
#include "kernels/cuda/shared_mlp_decode_launch.h"
#include "kernels/cuda/shared_mlp_decode_task.h"

namespace fips::cuda {
namespace {

using namespace fips::cuda::testing;

template <class T>
void expect_outputs(const Problem<T>& problem) {
  const Case& c = problem.c;
  const double epsilon = sizeof(T) == 4 ? 2e-6 : kDType<T> == DType::kFloat16 ? 1e-3 : 8e-3;
  const Rows want = problem.expected(Rounding::kKernel);
  double scale = 0;
  for (const auto& row : want) {
    for (const double value : row) {
      scale = std::max(scale, std::abs(value));
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < problem.y_stride; ++i) {
      if (i >= c.width) {
        ASSERT_TRUE(std::isnan(problem.got(t, i))) << "wrote past the row at " << t << ", " << i;
        continue;
      }
      // Sums in another order now and then round z, h or w the other way.
      ASSERT_NEAR(problem.got(t, i), want[t][i], epsilon * (std::abs(want[t][i]) + 0.3 * scale))
          << "token " << t << ", output " << i;
    }
  }
}

template <class T>
void expect_right(const Case& c, bool both_orders = false) {
  SCOPED_TRACE(::testing::Message()
               << dtype_name(kDType<T>) << " tokens " << c.tokens << " up " << c.up.bk << "x"
               << c.up.bn << " down " << c.down.bk << "x" << c.down.bn << " gated " << c.gated
               << " identity " << c.identity << " bitmap " << c.up_bitmap << c.down_bitmap);
  Problem<T> problem(c);
  for (int reverse = 0; reverse <= static_cast<int>(both_orders); ++reverse) {
    problem.run(reverse == 1);
    expect_outputs(problem);
  }
}

// ---- every path
// ----------------------------------------------------------------------------------

class EveryDecodeBlock : public ::testing::TestWithParam<std::tuple<int, int, bool>> {
 protected:
  Case make() const {
    const auto [bk, bn, bitmap] = GetParam();
    Case c = with_blocks({bk, bn}, {bn, bk}, {bn, bk});
    c.rank = 140;
    c.hidden = 150;
    c.sm_count = 2;
    c.gated = (bk + bn) % 3 == 0;
    c.activation = Activation::kSilu;
    return bitmap ? all_bitmap(c) : c;
  }
};

TEST_P(EveryDecodeBlock, BFloat16) { expect_right<BFloat16>(make()); }

TEST_P(EveryDecodeBlock, Float32) {
  Case c = make();
  c.tokens = 9;
  c.sm_count = 1;
  expect_right<float>(c);
}

INSTANTIATE_TEST_SUITE_P(CudaDecode, EveryDecodeBlock,
                         ::testing::Combine(::testing::Values(16, 32, 64, 128),
                                            ::testing::Values(16, 32, 64, 128), ::testing::Bool()));

TEST(CudaDecode, EveryCountOfTokensInBothOrders) {
  for (const int64_t tokens : {1, 3, 8, 9, 16}) {
    Case c = with_blocks({64, 32}, {16, 128}, {32, 64});
    c.tokens = tokens;
    c.gated = true;
    c.sm_count = 2;
    expect_right<BFloat16>(c, true);
    expect_right<Half>(c);
    expect_right<float>(all_bitmap(c), tokens == 3);
  }
}

TEST(CudaDecode, EveryActivation) {
  for (const auto activation :
       {Activation::kIdentity, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu,
        Activation::kRelu, Activation::kRelu2, Activation::kQuickGelu}) {
    for (const bool gated : {false, true}) {
      Case c;
      c.activation = activation;
      c.gated = gated;
      c.sm_count = 1;
      expect_right<float>(c);
    }
  }
}

TEST(CudaDecode, IdentityBase) {
  for (const int64_t rank : {40, 0}) {
    for (const bool bitmap : {false, true}) {
      Case c;
      c.identity = true;
      c.gated = bitmap;
      c.rank = rank;
      c.tokens = 10;
      c = bitmap ? all_bitmap(c) : c;
      expect_right<BFloat16>(c, true);
      expect_right<float>(c);
    }
  }
}

TEST(CudaDecode, OwnBaseOfTheOutput) {
  for (const bool identity : {false, true}) {
    Case c;
    c.own_base_out = true;
    c.rank = 64;
    c.rank_out = 41;
    c.identity = identity;
    expect_right<BFloat16>(c);
    expect_right<float>(c);
  }
}

TEST(CudaDecode, MixedEncodings) {
  Case c = with_blocks({64, 64}, {32, 16}, {128, 32});
  c.gated = true;
  c.up_bitmap = c.down_bitmap = true;
  expect_right<BFloat16>(c);
  c.up_bitmap = c.down_bitmap = false;
  c.gate_bitmap = true;
  expect_right<Half>(c);
}

TEST(CudaDecode, UnalignedMemoryAndNoBiases) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.skew = 1;
    c.width = 53;
    c.rank = 61;
    c.biases = false;
    c = bitmap ? all_bitmap(c) : c;
    expect_right<BFloat16>(c);
    expect_right<float>(c);
  }
}

// Long reductions go round every ring, on devices with much and with little shared memory.
TEST(CudaDecode, LongReductions) {
  for (const int shared_bytes : {227 * 1024, 163 * 1024, 99 * 1024}) {
    Case c = with_blocks({64, 64}, {64, 64}, {64, 64});
    c.width = 40;
    c.rank = 800;
    c.hidden = 400;
    c.density = 0.8;
    c.shared_bytes = shared_bytes;
    c.sm_count = 2;
    c.tokens = shared_bytes == 99 * 1024 ? 16 : 2;
    expect_right<BFloat16>(c);
    c.rank = 300;
    c.hidden = 200;
    c.sm_count = 1;
    expect_right<float>(all_bitmap(c));
  }
}

TEST(CudaDecode, AnyNumberOfMultiprocessors) {
  for (const int sm_count : {1, 2, 40}) {
    Case c;
    c.sm_count = sm_count;
    c.gated = true;
    expect_right<BFloat16>(c, true);
  }
}

// Few outputs and long reductions: shares of a tile meet across blocks, in every stage.
TEST(CudaDecode, SharesOfTheReduction) {
  for (const bool bitmap : {false, true}) {
    Case c = with_blocks({64, 64}, {16, 64}, {64, 64});
    c.width = 64;
    c.rank = 400;
    c.hidden = 128;
    c.own_base_out = true;
    c.rank_out = 1100;
    c.gated = true;
    c.density = 1.0;
    c.sm_count = 9;
    c.tokens = bitmap ? 2 : 11;
    c = bitmap ? all_bitmap(c) : c;
    const DecodeTask task = make_decode_task(Problem<BFloat16>(c).params(), c.sm_count);
    EXPECT_GT(task.split[kDecodeStages - 1].shares, 1);
    expect_right<BFloat16>(c, true);
    expect_right<float>(c);
  }
}

TEST(CudaDecode, EmptySlices) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.density = 0;
    expect_right<BFloat16>(bitmap ? all_bitmap(c) : c);
  }
}

TEST(CudaDecode, NoTokens) {
  Case c;
  Problem<float> problem(c);
  SharedMlpParams p = problem.params();
  p.tokens = 0;
  shared_mlp_decode(p, nullptr, nullptr);
}

// ---- promises
// ------------------------------------------------------------------------------------

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(CudaDecode, SameBitsOnEveryRun) {
  Case c;
  c.gated = true;
  c.tokens = 9;
  Problem<BFloat16> problem(c);
  problem.run();
  const auto first = problem.y;
  problem.run(true);
  EXPECT_TRUE(same_bits(problem.y, first)) << "depends on the order of blocks or warps";
  problem.run(false, 3);
  EXPECT_TRUE(same_bits(problem.y, first)) << "depends on what is left in the workspace";
}

// What a graph does: the same launch, nonce included, on the same memory with other tokens. A flag
// left from the last replay would let a block read old features.
TEST(CudaDecode, ReplaysOfOneLaunch) {
  for (const bool reverse : {false, true}) {
    Case c = with_blocks({64, 64}, {64, 64}, {64, 64});
    c.width = 64;
    c.rank = 600;  // stages 0, 2 and 3 in shares
    c.hidden = 700;
    c.sm_count = 7;
    Problem<BFloat16> problem(c);
    emulation::settings() = {{c.sm_count, 80, c.shared_bytes}, reverse};
    DecodeTask task = make_decode_task(problem.params(), c.sm_count);
    std::vector<uint64_t> workspace(ceil_div(plan_workspace(task, 2).bytes, 8), ~0ull);
    bind_workspace(task, workspace.data(), 2);
    task.nonce = 12345;
    for (int replay = 0; replay < 3; ++replay) {
      memset(problem.y.data(), 0xff, problem.y.size() * sizeof(BFloat16));
      launch_decode<BFloat16>(task, c.shared_bytes, nullptr);
      expect_outputs(problem);
      std::rotate(problem.x.begin(), problem.x.begin() + 1, problem.x.end());
    }
  }
}

// A device index cannot be validated on the host without waiting for the GPU: a broken one must be
// skipped. Memory checkers watch the accesses.
TEST(CudaDecode, BrokenIndicesAreSkipped) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.gated = true;
    Problem<BFloat16> problem(bitmap ? all_bitmap(c) : c);
    constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
    for (PackedSlice* slice : {&problem.up_slice, &problem.gate_slice, &problem.down_slice}) {
      slice->row_idx[0] = kFar;
      slice->col_idx[0] = -5;
      slice->block_id[1] = kFar;
      slice->block_id[2] = -1;
      slice->col_ptr.back() = kFar;
      slice->row_ptr.back() = kFar;
      slice->col_ptr[0] = -9;
      slice->row_ptr[0] = -9;
      if (bitmap) {
        slice->block_ptr[2] = kFar - 3;
        slice->block_ptr[3] = -4;
      }
    }
    problem.run();
    for (int64_t i = 0; i < c.width; ++i) {
      EXPECT_TRUE(std::isfinite(problem.got(0, i))) << i;
    }
  }
}

// Root mean square error against exact arithmetic, as a share of that of a chain of products whose
// results, gate, up and activation included, are all rounded to the element type.
TEST(CudaDecode, NoLessExactThanAChainOfProducts) {
  Case c = with_blocks({32, 32}, {32, 32}, {32, 32});
  c.gated = true;
  c.activation = Activation::kSilu;
  c.tokens = 16;
  c.width = 200;
  Problem<BFloat16> problem(c);
  problem.run();
  const Rows exact = problem.expected(Rounding::kNone), chain = problem.expected(Rounding::kChain);
  double ours = 0, theirs = 0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.width; ++i) {
      ours += std::pow(problem.got(t, i) - exact[t][i], 2);
      theirs += std::pow(chain[t][i] - exact[t][i], 2);
    }
  }
  EXPECT_LE(std::sqrt(ours), 1.1 * std::sqrt(theirs));
}

TEST(CudaDecode, RefusesWhatItCannotRun) {
  Case c;
  Problem<float> problem(c);
  emulation::settings() = {};
  const auto refused = [&](auto change) {
    SharedMlpParams p = problem.params();
    change(p);
    EXPECT_THROW(shared_mlp_decode_workspace_bytes(p), Error);
    EXPECT_THROW(shared_mlp_decode(p, nullptr, nullptr), Error);
  };
  refused([](auto& p) { p.tokens = 17; });
  refused([](auto& p) { p.dtype = DType::kFloat64; });
  refused([](auto& p) { p.dtype = DType::kFloat16; });
  refused([](auto& p) { p.up.rows += 1; });
  refused([](auto& p) { p.down.cols += 1; });
  refused([](auto& p) { p.identity = true; });
  refused([](auto& p) { p.up.bk = 48; });
}

}  // namespace
}  // namespace fips::cuda
