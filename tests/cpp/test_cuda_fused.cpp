// The whole MLP in one CUDA kernel, emulated, against float64.
#include <gtest/gtest.h>

#include <limits>

#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_fused.h"
#include "kernels/cuda/shared_mlp_fused_plan.h"
#include "kernels/cuda/strip.cuh"
#include "mlp_problem.h"

namespace fips::cuda {
namespace {

using fips::testing::MlpCase;
using fips::testing::MlpProblem;

constexpr int kHopperBytes = 227 * 1024;

double tolerance_of(DType dtype) { return dtype == DType::kBFloat16 ? 1e-2 : 1.3e-3; }

void expect_close(const MlpCase& c, int shared_bytes = kHopperBytes, bool reverse = false) {
  SCOPED_TRACE(::testing::Message() << "tokens " << c.tokens << " width " << c.width << " ranks "
                                    << c.rank << ", " << c.rank_out << " hidden " << c.hidden
                                    << " block " << c.bk << "x" << c.bn << " gated " << c.gated);
  emulation::settings() = {{1, 90, shared_bytes}, reverse};
  MlpProblem problem(c);
  const SharedMlpParams params = problem.params();
  ASSERT_TRUE(fuses_shared_mlp(params, current_device()));
  shared_mlp_fused(params, nullptr);
  EXPECT_LT(problem.relative_error(), tolerance_of(c.dtype));
}

TEST(CudaFused, StripOrderIsAPermutationOfContiguousQuads) {
  bool seen[16] = {};
  for (int i = 0; i < 16; ++i) {
    ASSERT_FALSE(seen[strip_order(i)]);
    seen[strip_order(i)] = true;
  }
  for (int pair = 0; pair < 4; ++pair) {  // what a lane loads: positions 2 pair, + 1, + 8, + 9
    EXPECT_EQ(strip_order(2 * pair), 4 * pair);
    EXPECT_EQ(strip_order(2 * pair + 1), 4 * pair + 1);
    EXPECT_EQ(strip_order(2 * pair + 8), 4 * pair + 2);
    EXPECT_EQ(strip_order(2 * pair + 9), 4 * pair + 3);
  }
}

class FusedActivation : public ::testing::TestWithParam<int> {};

TEST_P(FusedActivation, PlainAndGated) {
  MlpCase c;
  c.activation = static_cast<Activation>(GetParam());
  for (const bool gated : {false, true}) {
    c.gated = gated;
    expect_close(c);
  }
}

INSTANTIATE_TEST_SUITE_P(CudaFused, FusedActivation, ::testing::Range(0, 7));

TEST(CudaFused, EveryBlockEdge) {
  for (const int bk : {16, 32, 64, 128}) {
    for (const int bn : {16, 64, 128}) {
      MlpCase c;
      c.bk = bk;
      c.bn = bn;
      c.rank = 80;  // ragged against all but 16
      c.rank_out = 48;
      c.hidden = 150;
      c.density = 0.005;
      expect_close(c);
    }
  }
}

TEST(CudaFused, SeveralTilesAndChunks) {
  MlpCase c;
  c.tokens = 150;
  c.width = 64;
  c.hidden = 300;
  c.bn = 32;
  for (const bool gated : {false, true}) {
    c.gated = gated;
    expect_close(c);
    expect_close(c, 40 * 1024, true);  // tiles of 64 tokens, several chunks of h
  }
}

TEST(CudaFused, ChunksOfHGiveTheSameResult) {
  MlpCase c;
  c.hidden = 400;
  MlpProblem whole(c), chunked(c);
  emulation::settings() = {{1, 90, kHopperBytes}, false};
  const SharedMlpParams params = whole.params();
  ASSERT_EQ(plan_fused(params, current_device())->chunk, 400);
  shared_mlp_fused(params, nullptr);
  const SharedMlpParams again = chunked.params();
  emulation::settings().device.max_shared_bytes = 24 * 1024;
  ASSERT_LT(plan_fused(again, current_device())->chunk, 400);
  shared_mlp_fused(again, nullptr);
  for (int64_t i = 0; i < c.tokens * c.width; ++i) {
    ASSERT_EQ(whole.result(0, i), chunked.result(0, i)) << i;
  }
}

TEST(CudaFused, SlicesWithBlocksOfTheirOwn) {
  for (const int gate_bk : {16, 64, 128}) {
    for (const int up_bk : {16, 64}) {
      MlpCase c;
      c.gated = true;
      c.rank = 48;
      c.bk = up_bk;
      c.gate_bk = gate_bk;
      expect_close(c);
    }
  }
}

TEST(CudaFused, ManyRanksKeepSeveralSumsPerWarp) {
  MlpCase c;
  c.rank = 16;
  c.rank_out = 208;  // 26 pieces of w in a tile of 128 tokens: more than the warps
  c.tokens = 66;
  expect_close(c, kHopperBytes);
  c.gated = true;
  expect_close(c, kHopperBytes);
}

TEST(CudaFused, Float16SharedBaseNoBias) {
  MlpCase c;
  c.dtype = DType::kFloat16;
  c.shared_base = true;
  c.bias = false;
  expect_close(c);
  c.gated = true;
  c.density = 0;  // nothing stored at all
  MlpProblem problem(c);
  shared_mlp_fused(problem.params(), nullptr);
  for (int64_t i = 0; i < c.tokens * c.width; ++i) {
    ASSERT_EQ(problem.result(0, i), 0.0);
  }
}

// Memory checkers watch the accesses.
TEST(CudaFused, BrokenIndicesStayInBounds) {
  MlpCase c;
  c.gated = true;
  MlpProblem problem(c);
  constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
  for (auto* slice : {&problem.up, &problem.gate, &problem.down}) {
    fips::PackedSlice& packed = slice->packed;
    packed.row_idx[0] = packed.col_idx[1] = packed.block_id[2] = kFar;
    packed.row_idx[1] = packed.col_idx[0] = packed.block_id[1] = -3;
    packed.col_ptr[1] = packed.row_ptr[1] = kFar;
    packed.col_ptr[0] = packed.row_ptr[0] = -kFar;
  }
  emulation::settings() = {{1, 90, kHopperBytes}, false};
  shared_mlp_fused(problem.params(), nullptr);
  EXPECT_TRUE(std::isfinite(problem.relative_error()));
}

TEST(CudaFused, RefusesWhatItCannotDo) {
  emulation::settings() = {{1, 90, kHopperBytes}, false};
  MlpProblem problem(MlpCase{});
  const SharedMlpParams good = problem.params();
  const auto takes = [](SharedMlpParams p) { return fuses_shared_mlp(p, current_device()); };
  EXPECT_TRUE(takes(good));
  SharedMlpParams bad = good;
  bad.identity = true;
  EXPECT_FALSE(takes(bad));
  bad = good;
  bad.width = 40;
  EXPECT_FALSE(takes(bad));
  bad = good;
  bad.x = static_cast<const char*>(good.x) + 2;
  EXPECT_FALSE(takes(bad));
  bad = good;
  bad.width = bad.x_stride = 4096;  // does not fit on one multiprocessor
  EXPECT_FALSE(takes(bad));
  EXPECT_THROW(shared_mlp_fused(bad, nullptr), fips::Error);
}

SharedMlpParams shape(int64_t width, int64_t rank, int64_t hidden) {
  SharedMlpParams p;
  p.tokens = 50176;
  p.width = width;
  p.rank = p.rank_out = rank;
  p.up.rows = rank;
  p.up.cols = hidden;
  p.up.bk = p.up.bn = 16;
  return p;
}

TEST(FusedPlan, SwinStagesFitOnHopper) {
  const DeviceInfo hopper{132, 90, kHopperBytes};
  const auto first = plan_fused(shape(192, 96, 768), hopper);
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->token_tile, 128);
  const auto second = plan_fused(shape(384, 192, 1536), hopper);
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(second->token_tile, 128);
  for (const auto& plan : {first, second}) {
    EXPECT_LE(plan->shared_bytes, kHopperBytes);
    EXPECT_EQ(plan->chunk % 16, 0);
  }
  SharedMlpParams few = shape(192, 96, 768);
  few.tokens = 5000;  // 128 at a time would leave two thirds of the chip idle
  EXPECT_EQ(plan_fused(few, hopper)->token_tile, 64);
  EXPECT_TRUE(prefers_fused_mlp(few, hopper));
  few.tokens = 1000;
  EXPECT_FALSE(prefers_fused_mlp(few, hopper));
  EXPECT_EQ(plan_fused(shape(384, 384, 1536), hopper)->token_tile, 64);
  EXPECT_FALSE(plan_fused(shape(768, 768, 3072), hopper).has_value());
}

// benchmarks/gpu_every_kernel.py: 32 * sm_count + 64 tokens of its narrow MLP.
TEST(FusedPlan, TheCheckRunsTheFusedKernel) {
  for (const int sm_count : {78, 108, 132, 148, 170}) {
    SharedMlpParams narrow = shape(64, 32, 256);
    narrow.tokens = 32 * sm_count + 64;
    narrow.up.bk = narrow.up.bn = 32;
    const DeviceInfo device{sm_count, 90, kHopperBytes};
    EXPECT_TRUE(prefers_fused_mlp(narrow, device)) << sm_count;
    EXPECT_TRUE(plan_fused(narrow, device).has_value()) << sm_count;
  }
}

}  // namespace
}  // namespace fips::cuda
