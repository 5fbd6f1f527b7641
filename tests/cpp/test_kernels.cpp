// The CPU kernels alone, on every instruction set of this processor, against a naive product in
// double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "isa_fixture.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/dense_fill.h"
#include "kernels/reduce.h"
#include "slices.h"

namespace fips::testing {
namespace {

class Kernels : public OnEveryIsa {};

constexpr float kUntouched = -77.0f;

// Runs one product with padding around x and out, so that a stray access shows (and ASan sees the
// rest).
void expect_product(const PackedSlice& slice, const DenseSlice& dense, bool transpose,
                    int64_t tokens, const Parallel& parallel) {
  const int64_t in = transpose ? dense.cols : dense.rows, out = transpose ? dense.rows : dense.cols;
  const int64_t x_stride = in + 3, out_stride = out + 5;
  const std::vector<float> x = random_vector(tokens * x_stride, 7), bias = random_vector(out, 8);
  std::vector<float> y(static_cast<size_t>(tokens * out_stride), kUntouched);
  BlockSparseMmParams p;
  p.v = slice.view(DType::kFloat32);
  p.transpose = transpose;
  p.x = x.data();
  p.tokens = tokens;
  p.x_stride = x_stride;
  p.bias = bias.data();
  p.out = y.data();
  p.out_stride = out_stride;
  std::vector<char> workspace(static_cast<size_t>(cpu::block_sparse_mm_workspace(p, {}, parallel)) +
                              64);
  void* aligned = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  ASSERT_TRUE(cpu::block_sparse_mm(p, {}, aligned, parallel));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = bias[o];
      for (int64_t i = 0; i < in; ++i) {
        sum += double{x[t * x_stride + i]} *
               dense.values[transpose ? o * dense.cols + i : i * dense.cols + o];
      }
      ASSERT_NEAR(y[t * out_stride + o], sum, 1e-4) << "token " << t << " output " << o;
    }
    for (int64_t o = out; o < out_stride; ++o) {
      ASSERT_EQ(y[t * out_stride + o], kUntouched) << "padding of token " << t << " was written";
    }
  }
}

TEST_P(Kernels, ProductsMatchOnOddShapes) {
  for (int32_t bk : {16, 64, 128}) {
    for (int32_t bn : {16, 32, 128}) {
      for (bool bitmap : {false, true}) {
        const DenseSlice dense = random_dense(75, 141, 0.15, 11);
        const PackedSlice slice = pack(dense, bk, bn, bitmap);
        for (int64_t tokens : {0, 1, 7, 8, 9, 70}) {
          for (bool transpose : {false, true}) {
            SCOPED_TRACE(::testing::Message()
                         << bk << "x" << bn << " bitmap=" << bitmap << " tokens=" << tokens
                         << " transpose=" << transpose);
            expect_product(slice, dense, transpose, tokens, kSerial);
          }
        }
      }
    }
  }
}

TEST_P(Kernels, ManyThreadsGiveTheSameProduct) {
  const DenseSlice dense = random_dense(200, 300, 0.3, 12);
  for (bool bitmap : {false, true}) {
    const PackedSlice slice = pack(dense, 32, 32, bitmap);
    expect_product(slice, dense, false, 100, kManyThreads);
    expect_product(slice, dense, true, 5, kManyThreads);
  }
}

TEST_P(Kernels, MoreTokensThanOnePackedRange) {
  const DenseSlice dense = random_dense(16, 20, 0.8, 13);
  expect_product(pack(dense, 16, 16, false), dense, false, 4100, kSerial);
}

TEST_P(Kernels, SampledProductsAccumulate) {
  const DenseSlice dense = random_dense(75, 141, 0.15, 14);
  const int64_t tokens = 67, a_stride = 80, b_stride = 150;
  const std::vector<float> a = random_vector(tokens * a_stride, 15),
                           b = random_vector(tokens * b_stride, 16);
  for (bool bitmap : {false, true}) {
    const PackedSlice slice = pack(dense, 32, 16, bitmap);
    std::vector<float> sums(static_cast<size_t>(slice.num_values()), 1.0f);
    BlockSparseSddmmParams p;
    p.v = slice.view(DType::kFloat32);
    p.a = a.data();
    p.a_stride = a_stride;
    p.b = b.data();
    p.b_stride = b_stride;
    p.tokens = tokens;
    p.out = sums.data();
    p.accumulate = true;
    cpu::block_sparse_sddmm(p, kManyThreads);

    std::vector<double> exact(static_cast<size_t>(dense.rows * dense.cols));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < dense.rows; ++k) {
        for (int64_t j = 0; j < dense.cols; ++j) {
          exact[k * dense.cols + j] += double{a[t * a_stride + k]} * b[t * b_stride + j];
        }
      }
    }
    PackedSlice result = slice;
    std::memcpy(result.values.data(), sums.data(), result.values.size());
    std::vector<float> sampled(exact.size());
    unpack(result, sampled.data());
    for (size_t i = 0; i < exact.size(); ++i) {
      if (dense.keep[i]) {
        ASSERT_NEAR(sampled[i], exact[i] + 1.0, 1e-3);
      }
    }
  }
}

TEST_P(Kernels, ActivationGradientsMatchDifferences) {
  constexpr int64_t kCount = 600;
  const std::vector<float> start = random_vector(kCount, 17), gates = random_vector(kCount, 18);
  const std::vector<float> ones(kCount, 1.0f);
  for (int32_t kind = 0; kind < 7; ++kind) {
    auto value = [&](std::vector<float> up, std::vector<float> gate) {
      ActivationParams p;
      p.activation = static_cast<Activation>(kind);
      p.count = kCount;
      p.up = p.h = up.data();
      p.gate = gate.data();
      cpu::activation_forward(p, kManyThreads);
      return up;
    };
    std::vector<float> up = start, gate = gates, h(kCount);
    ActivationParams p;
    p.activation = static_cast<Activation>(kind);
    p.count = kCount;
    p.up = up.data();
    p.gate = gate.data();
    p.grad_h = ones.data();
    p.h = h.data();
    cpu::activation_backward(p, kSerial);
    constexpr float kStep = 1e-2f;
    std::vector<float> above = gates, below = gates;
    for (int64_t i = 0; i < kCount; ++i) {
      above[i] += kStep;
      below[i] -= kStep;
    }
    const std::vector<float> at = value(start, gates), high = value(start, above),
                             low = value(start, below);
    for (int64_t i = 0; i < kCount; ++i) {
      ASSERT_EQ(h[i], at[i]);
      ASSERT_NEAR(up[i] * start[i], at[i], 1e-5);
      const bool kink = (kind == 4 || kind == 5) && std::fabs(gates[i]) < 2 * kStep;
      if (!kink) {
        ASSERT_NEAR(gate[i], (high[i] - low[i]) / (2 * kStep), 2e-3)
            << "activation " << kind << " at " << gates[i];
      }
    }
  }
}

TEST_P(Kernels, ActivationsSurviveExtremes) {
  for (int32_t kind = 0; kind < 7; ++kind) {
    std::vector<float> x = {-1e4f, -100.0f, -0.0f, 0.0f, 1e-30f, 100.0f, 1e4f};
    ActivationParams p;
    p.activation = static_cast<Activation>(kind);
    p.count = static_cast<int64_t>(x.size());
    p.up = p.h = x.data();
    cpu::activation_forward(p, kSerial);
    for (float y : x) {
      EXPECT_TRUE(std::isfinite(y)) << "activation " << kind;
    }
    EXPECT_NEAR(x[3], 0.0f, 0.0f);
    if (p.activation != Activation::kIdentity && p.activation != Activation::kRelu2) {
      EXPECT_NEAR(x[0], 0.0f, 1e-30f) << "activation " << kind;
      EXPECT_EQ(x[6], 1e4f) << "activation " << kind;
    }
    std::vector<float> nan(20, NAN);
    p.count = 20;
    p.up = p.h = nan.data();
    cpu::activation_forward(p, kSerial);
    for (float y : nan) {
      EXPECT_TRUE(std::isnan(y)) << "activation " << kind;
    }
  }
}

TEST_P(Kernels, GathersWhatItFilled) {
  for (int32_t bk : {16, 64}) {
    for (bool bitmap : {false, true}) {
      const DenseSlice dense = random_dense(45, 83, 0.3, 19);
      const PackedSlice slice = pack(dense, bk, 32, bitmap);
      const BlockSparseView v = slice.view(DType::kFloat32);
      std::vector<float> transposed(static_cast<size_t>(dense.rows * dense.cols), -1.0f);
      cpu::fill_dense_transposed(v, transposed.data(), kManyThreads);
      for (int64_t k = 0; k < dense.rows; ++k) {
        for (int64_t j = 0; j < dense.cols; ++j) {
          ASSERT_EQ(transposed[j * dense.rows + k], dense.values[k * dense.cols + j]);
        }
      }
      std::vector<float> gathered(static_cast<size_t>(slice.num_values()), 7.0f);
      GatherParams p;
      p.v = v;
      p.dense = transposed.data();
      p.out = gathered.data();
      cpu::gather_stored(p, kManyThreads);
      ASSERT_EQ(std::memcmp(gathered.data(), slice.values.data(), slice.values.size()), 0);
      p.accumulate = true;
      cpu::gather_stored(p, kSerial);
      const auto* values = reinterpret_cast<const float*>(slice.values.data());
      for (int64_t i = 0; i < slice.num_values(); ++i) {
        ASSERT_EQ(gathered[i], 2 * values[i]);
      }
    }
  }
}

FIPS_INSTANTIATE_ON_EVERY_ISA(Kernels);

TEST(Reduce, WeightedResidualDoesNotDependOnThreads) {
  constexpr int64_t kRows = 300, kCols = 333;
  const std::vector<float> target = random_vector(kRows * kCols, 20),
                           weight = random_vector(kRows, 22);
  const std::vector<float> y = random_vector(kRows * kCols, 21);
  std::vector<float> a = y, b = y;
  const double one = cpu::weighted_residual(a.data(), target.data(), weight.data(), DType::kFloat32,
                                            kRows, kCols, kSerial);
  const double many = cpu::weighted_residual(b.data(), target.data(), weight.data(),
                                             DType::kFloat32, kRows, kCols, kManyThreads);
  EXPECT_EQ(one, many);
  EXPECT_EQ(a, b);
  double exact = 0;
  for (int64_t i = 0; i < kRows * kCols; ++i) {
    const double difference = double{y[i]} - target[i];
    exact += weight[i / kCols] * difference * difference;
    ASSERT_NEAR(a[i], weight[i / kCols] * difference, 1e-5);
  }
  EXPECT_NEAR(one, exact, 1e-3);
}

TEST(Dispatch, RefusesUnknownCapabilities) {
  setenv("FIPS_CPU_CAPABILITY", "mmx", 1);
  EXPECT_THROW(cpu::active_isa(), Error);
  unsetenv("FIPS_CPU_CAPABILITY");
  EXPECT_EQ(cpu::active_isa(), cpu::detect_isa());
}

}  // namespace
}  // namespace fips::testing
