// The CUDA kernels around the products, emulated: activations, residual, sums, filling and
// gathering.
#include <gtest/gtest.h>

#include <cmath>

#include "elements.h"
#include "exact_activation.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/dense_fill.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/residual.h"
#include "slices.h"

namespace fips::cuda {
namespace {

using fips::testing::Elements;
using fips::testing::random_dense;
using fips::testing::random_vector;

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

double epsilon_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4e-7 : dtype == DType::kFloat16 ? 1.0 / 1024 : 1.0 / 128;
}

double exact(int kind, double x) {
  return fips::testing::exact_activation(static_cast<Activation>(kind), x);
}

double exact_slope(int kind, double x) {
  constexpr double kStep = 1e-5;
  return (exact(kind, x + kStep) - exact(kind, x - kStep)) / (2 * kStep);
}

class ActivationKernel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { emulation::settings() = {}; }
  static constexpr int64_t kCount = 2061;  // several thread blocks, the last one ragged
};

TEST_P(ActivationKernel, ForwardAndBackward) {
  const int kind = GetParam();
  for (const DType dtype : kTypes) {
    for (const bool gated : {false, true}) {
      SCOPED_TRACE(::testing::Message() << dtype_name(dtype) << " gated " << gated);
      std::vector<float> wide = random_vector(kCount, 1);
      for (float& value : wide) {
        value *= 4;
      }
      const Elements up(wide, dtype), gate(random_vector(kCount, 2), dtype),
          grad(random_vector(kCount, 3), dtype);
      Elements h = up, d_up = up, d_gate = gate, again(wide, dtype);
      ActivationParams p;
      p.activation = static_cast<Activation>(kind);
      p.dtype = dtype;
      p.count = kCount;
      p.up = p.h = h.data();
      p.gate = gated ? d_gate.data() : nullptr;
      activation_forward(p, nullptr);
      p.up = d_up.data();
      p.grad_h = grad.data();
      p.h = again.data();
      activation_backward(p, nullptr);
      const double epsilon = epsilon_of(dtype);
      for (int64_t i = 0; i < kCount; ++i) {
        const double u = up[i], g = gate[i], dh = grad[i], inner = gated ? g : u;
        const double act = exact(kind, inner), slope = exact_slope(kind, inner);
        const double want = gated ? act * u : act, want_up = gated ? dh * act : dh * slope;
        // What float32 leaves of a distribution function near 0 or 1, times x; float16's last step.
        const double room = 1.5e-7 * (1 + std::abs(inner)) * (gated ? 1 + std::abs(u) : 1);
        ASSERT_NEAR(h[i], want, epsilon * std::abs(want) + room) << i << " x " << inner;
        ASSERT_EQ(again[i], h[i]);
        ASSERT_NEAR(d_up[i], want_up, epsilon * std::abs(want_up) + 1e-5 * (1 + std::abs(dh)))
            << i << " x " << inner;
        if (gated) {
          const double want_gate = dh * u * slope;
          ASSERT_NEAR(d_gate[i], want_gate,
                      epsilon * std::abs(want_gate) + 2e-5 * (1 + std::abs(dh * u)))
              << i << " x " << inner;
        }
      }
    }
  }
}

TEST_P(ActivationKernel, LimitsAndNaN) {
  const int kind = GetParam();
  const std::vector<float> x{-1e4f, -100.0f, -0.0f, 100.0f, 1e4f, std::nanf("")};
  for (const DType dtype : kTypes) {
    Elements h(x, dtype);
    ActivationParams p;
    p.activation = static_cast<Activation>(kind);
    p.dtype = dtype;
    p.count = static_cast<int64_t>(x.size());
    p.up = p.h = h.data();
    activation_forward(p, nullptr);
    for (int64_t i = 0; i + 1 < p.count; ++i) {
      const double rounded = Elements(x, dtype)[i], want = exact(kind, rounded);
      if (std::abs(want) < 6e4) {  // float16 ends there
        EXPECT_NEAR(h[i], want, epsilon_of(dtype) * std::abs(want) + 1e-36)
            << dtype_name(dtype) << x[i];
      }
    }
    EXPECT_TRUE(std::isnan(h[p.count - 1])) << dtype_name(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(CudaElementwise, ActivationKernel, ::testing::Range(0, 7));

TEST(CudaElementwise, Residual) {
  constexpr int64_t kRows = 9, kCols = 301;
  const std::vector<float> weight = random_vector(kRows, 5);
  for (const DType dtype : kTypes) {
    for (const float* weights : {static_cast<const float*>(nullptr), weight.data()}) {
      const Elements y(random_vector(kRows * kCols, 1), dtype);
      const Elements target(random_vector(kRows * kCols, 2), dtype);
      Elements residual = y;
      std::vector<double> row_sums(kRows, std::nan(""));
      double loss = 3, exact = 3;
      weighted_residual(
          {dtype, residual.data(), target.data(), weights, kRows, kCols, row_sums.data(), &loss},
          nullptr);
      for (int64_t i = 0; i < kRows * kCols; ++i) {
        const double w = weights == nullptr ? 1 : weights[i / kCols], difference = y[i] - target[i];
        exact += w * difference * difference;
        ASSERT_NEAR(residual[i], w * difference, epsilon_of(dtype) * std::abs(w * difference));
      }
      EXPECT_NEAR(loss, exact, 1e-5 * kRows * kCols);
      float result = 0;
      scale_loss(&result, &loss, 0.25, nullptr);
      EXPECT_FLOAT_EQ(result, static_cast<float>(0.25 * loss));
    }
  }
}

TEST(CudaElementwise, Sums) {
  constexpr int64_t kRows = 600, kCols = 270;
  for (const DType dtype : kTypes) {
    const Elements matrix(random_vector(kRows * kCols, 1), dtype);
    std::vector<float> columns(kCols, 2.0f), sums(kRows * kCols, 1.0f);
    const ColumnSumParams p{matrix.data(), dtype, kRows, kCols, columns.data()};
    std::vector<char> workspace(add_column_sums_workspace(p));
    add_column_sums(p, workspace.data(), nullptr);
    add_into(sums.data(), matrix.data(), dtype, kRows * kCols, nullptr);
    Elements scaled(sums, dtype);
    scale_into(scaled.data(), sums.data(), -0.5, dtype, kRows * kCols, nullptr);
    for (int64_t c = 0; c < kCols; ++c) {
      double exact = 2;
      for (int64_t row = 0; row < kRows; ++row) {
        exact += matrix[row * kCols + c];
      }
      ASSERT_NEAR(columns[c], exact, 1e-4);
    }
    for (int64_t i = 0; i < kRows * kCols; ++i) {
      ASSERT_FLOAT_EQ(sums[i], 1 + static_cast<float>(matrix[i]));
      ASSERT_NEAR(scaled[i], -0.5 * sums[i], epsilon_of(dtype) * std::abs(sums[i]));
    }
  }
}

// Filling a matrix up and gathering its stored slots gives the values back.
TEST(CudaElementwise, FillAndGather) {
  for (const bool bitmap : {false, true}) {
    for (const auto& [bk, bn] : {std::pair(16, 16), std::pair(32, 128), std::pair(128, 64)}) {
      SCOPED_TRACE(::testing::Message() << bk << "x" << bn << " bitmap " << bitmap);
      const auto dense = random_dense(150, 170, 0.02, 7);
      const PackedSlice slice = fips::testing::pack(dense, bk, bn, bitmap);
      const BlockSparseView view = slice.view(DType::kFloat32);
      std::vector<float> filled(150 * 170, std::nanf(""));
      emulation::settings() = {};
      fill_dense_transposed(view, filled.data(), nullptr);
      for (int64_t r = 0; r < 150; ++r) {
        for (int64_t n = 0; n < 170; ++n) {
          ASSERT_EQ(filled[n * 150 + r], dense.values[r * 170 + n]) << r << ", " << n;
        }
      }
      std::vector<float> gathered(slice.num_values(), 1.0f);
      gather_stored({view, filled.data(), DType::kFloat32, gathered.data(), true}, nullptr);
      for (int64_t i = 0; i < slice.num_values(); ++i) {
        ASSERT_EQ(gathered[i], 1 + static_cast<const float*>(view.values)[i]) << i;
      }
    }
  }
}

TEST(CudaElementwise, BrokenIndicesStayInBounds) {
  for (const bool bitmap : {false, true}) {
    PackedSlice slice = fips::testing::pack(random_dense(150, 170, 0.05, 7), 32, 32, bitmap);
    slice.row_idx[0] = 1 << 30;
    slice.row_idx[1] = -1;
    slice.col_ptr[1] = -5;
    slice.col_ptr[2] = 1 << 30;
    if (bitmap) {
      slice.block_ptr[1] = -100;
      slice.block_ptr[2] = 1 << 30;
    }
    const BlockSparseView view = slice.view(DType::kFloat32);
    std::vector<float> filled(150 * 170), gathered(slice.num_values(), 0.0f);
    fill_dense_transposed(view, filled.data(), nullptr);
    gather_stored({view, filled.data(), DType::kFloat32, gathered.data(), false}, nullptr);
    for (const float value : gathered) {
      ASSERT_TRUE(std::isfinite(value));
    }
  }
}

}  // namespace
}  // namespace fips::cuda
