// Hopper's block_sparse_mm, run on the CPU from its own source (csrc/kernels/cuda/emulation_sm90.h)
// against a float64 product.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "core/pack.h"
#include "exact_activation.h"
#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_mm_sm90.h"
#include "kernels/cuda/emulation.h"

namespace fips::cuda {
namespace {

constexpr DeviceInfo kHopper{132, 90, 227 * 1024};

struct Case {
  int64_t tokens = 130, rows = 150, cols = 200;
  int bk = 64, bn = 128;
  bool transposed = false, gated = false, bias = true;
  Activation activation = Activation::kIdentity;
  int sm_count = 2;  // fewer than tiles, so that thread blocks walk several
  double density = 0.6;
  std::optional<Sm90Plan> plan;  // none: through block_sparse_mm
  int x_gap = 8;                 // elements between rows of x beyond the features
};

template <class T>
constexpr DType kDType = DType::kBFloat16;
template <>
constexpr DType kDType<Half> = DType::kFloat16;

// A slice with its bias, and dense copies of both.
template <class T>
struct Weights {
  PackedSlice slice;
  std::vector<T> dense, bias;
};

template <class T>
class Problem {
 public:
  explicit Problem(const Case& c)
      : c(c), random_(static_cast<unsigned>(c.tokens * 31 + c.bk + c.bn)) {
    v = make_weights();
    gate = make_weights();
    in = c.transposed ? c.cols : c.rows;
    out = c.transposed ? c.rows : c.cols;
    x_stride = round_up(in, 8) + c.x_gap;
    out_stride = round_up(out, 8) + 8;
    x.resize(c.tokens * x_stride);
    for (T& value : x) {
      value = draw(1);
    }
    y.assign(c.tokens * out_stride, poison());
  }

  BlockSparseMmParams params() {
    BlockSparseMmParams p;
    p.v = v.slice.view(kDType<T>);
    p.transpose = c.transposed;
    p.x = x.data();
    p.tokens = c.tokens;
    p.x_stride = x_stride;
    p.bias = c.bias ? v.bias.data() : nullptr;
    p.out = y.data();
    p.out_stride = out_stride;
    return p;
  }

  void run(bool reverse) {
    emulation::settings() = {{c.sm_count, 90, 227 * 1024}, reverse};
    y.assign(y.size(), poison());
    const BlockSparseView gate_view = gate.slice.view(kDType<T>);
    const MmEpilogue epilogue{c.activation, c.gated ? &gate_view : nullptr,
                              c.bias ? gate.bias.data() : nullptr};
    const BlockSparseMmParams p = params();
    ASSERT_TRUE(sm90_supports(p, epilogue, emulation::device()));
    if (c.plan.has_value()) {
      block_sparse_mm_sm90(p, epilogue, *c.plan, nullptr);
    } else {
      block_sparse_mm(p, epilogue, nullptr);
    }
    emulation::settings() = {};
  }

  struct Sum {
    double value, magnitude;
  };

  Sum product(const Weights<T>& w, int64_t token, int64_t feature) const {
    Sum sum{c.bias ? to_accumulator(w.bias[feature]) : 0.0, 1};
    for (int64_t i = 0; i < in; ++i) {
      const T weight = w.dense[c.transposed ? feature * c.cols + i : i * c.cols + feature];
      const double term = double{to_accumulator(weight)} * to_accumulator(x[token * x_stride + i]);
      sum.value += term;
      sum.magnitude += std::abs(term);
    }
    return sum;
  }

  // The exact output and how far float32 sums may lead from it.
  Sum expected(int64_t token, int64_t feature) const {
    const Sum up = product(v, token, feature);
    if (!c.gated) {
      return {fips::testing::exact_activation(c.activation, up.value), 4 * up.magnitude};
    }
    const Sum g = product(gate, token, feature);
    return {fips::testing::exact_activation(c.activation, g.value) * up.value,
            4 * (g.magnitude + 1) * (up.magnitude + 1)};
  }

  void expect_outputs() const {
    const double epsilon = kDType<T> == DType::kFloat16 ? 1.0 / 2048 : 1.0 / 256;
    for (int64_t token = 0; token < c.tokens; ++token) {
      for (int64_t i = 0; i < out_stride; ++i) {
        const double got = to_accumulator(y[token * out_stride + i]);
        if (i >= out) {
          ASSERT_TRUE(std::isnan(got)) << "wrote past the row at " << token << ", " << i;
          continue;
        }
        const Sum want = expected(token, i);
        ASSERT_NEAR(got, want.value, epsilon * std::abs(want.value) + 1e-6 * want.magnitude)
            << "token " << token << ", output " << i;
      }
    }
  }

  static T poison() {
    T value;
    memset(&value, 0xff, sizeof value);
    return value;
  }

  Case c;
  int64_t in, out, x_stride, out_stride;
  Weights<T> v, gate;
  std::vector<T> x, y;

 private:
  T draw(float scale) { return FromAccumulator<T>::convert(scale * normal_(random_)); }

  Weights<T> make_weights() {
    Weights<T> w;
    w.dense.resize(c.rows * c.cols);
    std::vector<uint8_t> keep(w.dense.size());
    std::bernoulli_distribution coin(c.density);
    std::vector<bool> stored(ceil_div(c.rows, c.bk) * ceil_div(c.cols, c.bn));
    for (size_t i = 0; i < stored.size(); ++i) {
      stored[i] = coin(random_);
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t n = 0; n < c.cols; ++n) {
        const bool kept = stored[r / c.bk * ceil_div(c.cols, c.bn) + n / c.bn];
        keep[r * c.cols + n] = kept;
        w.dense[r * c.cols + n] = kept ? draw(0.2f) : T{};
      }
    }
    w.slice = pack(w.dense.data(), keep.data(), c.rows, c.cols, c.bk, c.bn, sizeof(T), false);
    for (int64_t i = 0; i < (c.transposed ? c.rows : c.cols); ++i) {
      w.bias.push_back(draw(1));
    }
    return w;
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

template <class T = BFloat16>
void expect_right(const Case& c, bool both_orders = false) {
  SCOPED_TRACE(::testing::Message()
               << dtype_name(kDType<T>) << " tokens " << c.tokens << " block " << c.bk << "x"
               << c.bn << " transposed " << c.transposed << " gated " << c.gated << " activation "
               << static_cast<int>(c.activation));
  Problem<T> problem(c);
  for (int reverse = 0; reverse <= static_cast<int>(both_orders); ++reverse) {
    SCOPED_TRACE(::testing::Message() << "reverse " << reverse);
    problem.run(reverse == 1);
    problem.expect_outputs();
  }
}

class Sm90Blocks : public ::testing::TestWithParam<std::tuple<int, int, bool>> {};

TEST_P(Sm90Blocks, Streamed) {
  Case c;
  std::tie(c.bk, c.bn, c.transposed) = GetParam();
  c.plan = Sm90Plan{false, 256};
  expect_right(c, true);
  c.tokens = 150;
  c.plan = Sm90Plan{false, 128};
  expect_right<Half>(c);
}

INSTANTIATE_TEST_SUITE_P(CudaSm90, Sm90Blocks,
                         ::testing::Combine(::testing::Values(64, 128), ::testing::Values(64, 128),
                                            ::testing::Bool()));

TEST(CudaSm90, ResidentBlocks) {
  for (const int bk : {64, 128}) {
    for (const int bn : {64, 128}) {
      Case c;
      c.bk = bk;
      c.bn = bn;
      c.plan = Sm90Plan{true, 96};
      expect_right(c, true);
      c.plan = Sm90Plan{true, 128};
      c.gated = true;
      expect_right<Half>(c);
    }
  }
}

// Blocks of threads that end inside a token tile, and reload x several times.
TEST(CudaSm90, ResidentTilesAreSharedUnevenly) {
  for (const int sm_count : {1, 2, 5}) {
    Case c;
    c.tokens = 300;
    c.bn = 64;
    c.cols = 170;
    c.sm_count = sm_count;
    c.plan = Sm90Plan{true, 96};
    expect_right(c, sm_count < 3);
  }
}

TEST(CudaSm90, WideResidentTiles) {
  for (const int tokens : {192, 256}) {
    Case c;
    c.tokens = 270;
    c.bn = 64;
    c.rows = 240;
    c.plan = Sm90Plan{true, tokens};
    expect_right(c);
  }
}

// The most input features that stay, and one panel more.
TEST(CudaSm90, ResidentLimit) {
  Case c;
  c.tokens = 97;
  c.rows = 768;
  c.bn = 64;
  c.cols = 130;
  c.density = 0.3;
  c.plan = Sm90Plan{true, 96};
  expect_right(c);
  c.rows = 770;
  Problem<BFloat16> wider(c);
  EXPECT_THROW(block_sparse_mm_sm90(wider.params(), {}, *c.plan, nullptr), Error);
}

TEST(CudaSm90, GateWithEveryTile) {
  for (const int bn : {64, 128}) {
    for (const Sm90Plan& plan : {Sm90Plan{false, 128}, Sm90Plan{false, bn == 64 ? 256 : 192},
                                 Sm90Plan{true, 96}, Sm90Plan{true, 128}}) {
      Case c;
      c.tokens = 200;
      c.bn = bn;
      c.gated = true;
      c.activation = Activation::kSilu;
      c.plan = plan;
      expect_right(c);
    }
  }
}

TEST(CudaSm90, ThroughTheEntryPoint) {
  for (const bool transposed : {false, true}) {
    Case c;
    c.tokens = 200;
    c.transposed = transposed;
    expect_right(c, true);
    expect_right<Half>(c);
  }
}

TEST(CudaSm90, EveryActivation) {
  for (int i = 0; i < 7; ++i) {
    Case c;
    c.tokens = 70;
    c.rows = 64;
    c.bn = 64;
    c.cols = 72;
    c.activation = static_cast<Activation>(i);
    expect_right<Half>(c);
    c.gated = true;
    c.bias = false;
    expect_right<Half>(c);
  }
}

TEST(CudaSm90, EmptyColumnsAndOneEmptyProduct) {
  for (const int64_t tokens : {100, 129}) {
    Case c;
    c.tokens = tokens;
    c.bn = 64;
    c.cols = 300;
    c.rows = 70;
    c.density = 0.3;
    c.gated = true;
    c.activation = Activation::kRelu;
    expect_right(c, true);
    c.gated = false;
    expect_right(c);
  }
}

// More steps than stages, and more index entries than a warp reads at a time.
TEST(CudaSm90, LongReduction) {
  Case c;
  c.rows = 64 * 40;
  c.tokens = 100;
  c.cols = 64;
  c.bn = 64;
  c.density = 0.95;
  c.sm_count = 132;
  expect_right(c, true);
}

// As test_cuda_emulated.cpp: skipped, and never followed.
TEST(CudaSm90, BrokenIndicesAreReadAsZeros) {
  constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
  for (const bool transposed : {false, true}) {
    Case c;
    c.transposed = transposed;
    c.gated = !transposed;
    c.density = 1;
    Problem<BFloat16> problem(c);
    for (Weights<BFloat16>* w : {&problem.v, &problem.gate}) {
      w->slice.row_idx[0] = kFar;
      w->slice.row_idx[1] = -3;
      w->slice.col_idx[0] = -5;
      w->slice.block_id[1] = kFar;
      w->slice.block_id[2] = -1;
      w->slice.col_ptr.back() = kFar;
      w->slice.row_ptr.back() = kFar;
      w->slice.col_ptr[0] = -9;
      w->slice.row_ptr[0] = -9;
    }
    problem.run(false);
    for (int64_t i = 0; i < problem.out; ++i) {
      EXPECT_TRUE(std::isfinite(to_accumulator(problem.y[i]))) << i;
    }
  }
}

TEST(CudaSm90, BrokenEntriesMeetNoInput) {
  Case c;
  c.density = 1;
  c.bias = false;
  c.cols = 64;
  c.bn = 64;
  c.rows = 900;  // too many to stay in shared memory
  Problem<BFloat16> problem(c);
  std::fill(problem.v.slice.row_idx.begin(), problem.v.slice.row_idx.end(), -1);
  for (BFloat16& value : problem.x) {
    value = FromAccumulator<BFloat16>::convert(std::numeric_limits<float>::infinity());
  }
  problem.run(false);
  for (int64_t i = 0; i < problem.out; ++i) {
    EXPECT_EQ(to_accumulator(problem.y[i]), 0) << i;
  }
}

class Sm90Supports : public ::testing::Test {
 protected:
  bool supported() { return sm90_supports(problem.params(), epilogue, device); }
  bool supported_with(const BlockSparseMmParams& p) { return sm90_supports(p, epilogue, device); }

  Problem<BFloat16> problem{Case{}};
  MmEpilogue epilogue;
  DeviceInfo device = kHopper;
};

TEST_F(Sm90Supports, WhatTheKernelsRun) {
  EXPECT_TRUE(supported());
  epilogue.activation = Activation::kSilu;
  EXPECT_TRUE(supported());
  const BlockSparseView gate = problem.gate.slice.view(DType::kBFloat16);
  epilogue.gate = &gate;
  EXPECT_TRUE(supported());
}

TEST_F(Sm90Supports, NotTheRest) {
  BlockSparseMmParams p = problem.params();
  p.tokens = 64;
  EXPECT_FALSE(supported_with(p)) << "decode";
  p = problem.params();
  p.v.dtype = DType::kFloat32;
  EXPECT_FALSE(supported_with(p)) << "float32";
  p = problem.params();
  p.v.bk = 32;
  EXPECT_FALSE(supported_with(p)) << "narrow blocks";
  p = problem.params();
  p.v.num_blocks = 0;
  EXPECT_FALSE(supported_with(p)) << "no values to describe";
  p = problem.params();
  const uint8_t mask = 0;
  p.v.mask = &mask;
  EXPECT_FALSE(supported_with(p)) << "bitmap";
  p = problem.params();
  p.x = problem.x.data() + 1;
  EXPECT_FALSE(supported_with(p)) << "unaligned x";
  p = problem.params();
  p.out_stride += 1;
  EXPECT_FALSE(supported_with(p)) << "unaligned rows of out";
  p = problem.params();
  p.x_stride = 0;
  EXPECT_FALSE(supported_with(p)) << "overlapping rows of x";
  device.max_shared_bytes = 100 * 1024;
  EXPECT_FALSE(supported()) << "little shared memory";
}

TEST_F(Sm90Supports, AGateMustShareTheGrid) {
  BlockSparseView gate = problem.gate.slice.view(DType::kBFloat16);
  gate.bn = 64;
  epilogue.gate = &gate;
  EXPECT_FALSE(supported());
  epilogue.gate = nullptr;
  Case c;
  c.transposed = true;
  Problem<BFloat16> transposed(c);
  const BlockSparseMmParams p = transposed.params();
  EXPECT_TRUE(supported_with(p));
  epilogue.activation = Activation::kGelu;
  EXPECT_FALSE(supported_with(p)) << "the transposed product has no activation";
}

Sm90Plan plan(int64_t tokens, int64_t in, int64_t out, int bk, int bn, double density, bool gated) {
  const int64_t out_blocks = ceil_div(out, bn);
  const auto blocks = static_cast<int64_t>(density * static_cast<double>(out_blocks * (in / bk)));
  return choose_sm90_plan({tokens, in, out_blocks, blocks * (bk / 64) * (gated ? 2 : 1), bn, false,
                           gated, kHopper.sm_count});
}

TEST(CudaSm90Plan, LargeModelsStreamTallTiles) {
  const Sm90Plan plain = plan(4096, 2048, 8192, 64, 128, 0.25, false);
  EXPECT_FALSE(plain.resident);
  EXPECT_EQ(plain.tokens, 256);
  const Sm90Plan gated = plan(4096, 2048, 14336, 64, 128, 0.25, true);  // Llama-3-8B
  EXPECT_FALSE(gated.resident);
  EXPECT_EQ(gated.tokens, 192);
}

TEST(CudaSm90Plan, FewTilesAreCutSmaller) {
  EXPECT_EQ(plan(512, 4096, 4096, 64, 128, 0.25, false).tokens, 128);
  EXPECT_EQ(plan(70, 4096, 25600, 64, 128, 0.25, false).tokens, 128);
}

TEST(CudaSm90Plan, SmallModelsKeepTheirInput) {
  const Sm90Plan deit = plan(12608, 768, 3072, 64, 64, 0.25, false);
  EXPECT_TRUE(deit.resident);
  EXPECT_EQ(deit.tokens, 96);
  const Sm90Plan half = plan(12608, 384, 3072, 64, 64, 0.25, false);
  EXPECT_TRUE(half.resident);
  EXPECT_EQ(half.tokens, 192);
  EXPECT_FALSE(plan(12608, 1024, 4096, 64, 64, 0.25, false).resident);
  EXPECT_FALSE(plan(128, 768, 1024, 64, 64, 0.1, false).resident) << "loads more x than weights";
}

// benchmarks/gpu_every_kernel.py runs every kernel; these shapes of it run these two on every
// Hopper.
TEST(CudaSm90Plan, TheCheckRunsBothKernels) {
  for (const int sm_count : {78, 114, 132, 144}) {
    const Sm90Plan kept = choose_sm90_plan({1500, 256, 35, 70, 64, false, false, sm_count});
    EXPECT_TRUE(kept.resident) << sm_count;
    const Sm90Plan streamed = choose_sm90_plan({300, 192, 10, 10, 64, false, false, sm_count});
    EXPECT_FALSE(streamed.resident) << sm_count;
  }
}

TEST(CudaSm90Plan, EveryChoiceFits) {
  for (const int64_t tokens : {65, 200, 4000, 100000}) {
    for (const int64_t in : {64, 192, 256, 384, 576, 768, 832}) {
      for (const bool gated : {false, true}) {
        const Sm90Plan p = plan(tokens, in, 3072, 64, 64, 0.5, gated);
        EXPECT_TRUE(!p.resident || ceil_div(in, 64) <= resident_panels(p.tokens));
        EXPECT_LE(p.tokens, p.resident && gated ? 128 : 256);
      }
    }
  }
}

}  // namespace
}  // namespace fips::cuda
