// The small kernels of the initialisation ops, from their own source, on the CPU.
#include <gtest/gtest.h>

#include <vector>

#include "core/philox.h"
#include "kernels/cuda/diagonal.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/gaussian.h"
#include "kernels/cuda/power_shift.h"
#include "kernels/cuda/reduce.h"

namespace fips::cuda {
namespace {

double normal(uint64_t seed, int64_t i) {
  const NormalPair pair = philox_normals(seed, static_cast<uint64_t>(i / 2));
  return i % 2 == 0 ? pair.first : pair.second;
}

TEST(CudaGaussian, SamplesAreAFunctionOfSeedAndPosition) {
  emulation::settings() = {};
  for (const int64_t count : {0, 1, 2, 511, 513}) {
    std::vector<float> single(count + 1, -99.0f);
    std::vector<double> twice(count + 1, -99.0);
    gaussian(single.data(), count, DType::kFloat32, 5, nullptr);
    gaussian(twice.data(), count, DType::kFloat64, 5, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(twice[i], normal(5, i));
      ASSERT_EQ(single[i], static_cast<float>(normal(5, i)));
    }
    EXPECT_EQ(single[count], -99.0f);
    EXPECT_EQ(twice[count], -99.0);
  }
  EXPECT_THROW(gaussian(nullptr, 1, DType::kFloat16, 0, nullptr), Error);
}

// Matrices of an odd size share pairs of samples.
TEST(CudaGaussian, NoiseOnScaledMatrices) {
  constexpr int64_t kBatch = 3, kCount = 175;
  const std::vector<float> scale{2.0f, 0.0f, 0.5f};
  std::vector<float> in(kBatch * kCount);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<float>(i) - 200;
  }
  std::vector<double> out(in.size() + 1, -99.0);
  scaled_with_noise(in.data(), scale.data(), out.data(), kBatch, kCount, DType::kFloat32, 0.25, 9,
                    nullptr);
  for (size_t i = 0; i < in.size(); ++i) {
    const double s = scale[i / kCount];
    const double want = (s == 0 ? 0.0 : in[i] / s) + 0.25 * normal(9, static_cast<int64_t>(i));
    ASSERT_DOUBLE_EQ(out[i], want) << i;
  }
  EXPECT_EQ(out.back(), -99.0);
}

template <class T>
void expect_lift(int64_t width, DType dtype) {
  constexpr int64_t kBatch = 2;
  std::vector<T> matrices(kBatch * width * width);
  for (size_t i = 0; i < matrices.size(); ++i) {
    matrices[i] = static_cast<T>(i % 13);
  }
  std::fill_n(matrices.begin(), width * width, T(0));
  const std::vector<T> before = matrices;
  std::vector<double> added(kBatch, -1.0);
  add_to_diagonal(matrices.data(), kBatch, width, dtype, 0.5, 0.125, added.data(), nullptr);
  double trace = 0;
  for (int64_t i = 0; i < width; ++i) {
    trace += before[width * width + i * (width + 1)];
  }
  EXPECT_DOUBLE_EQ(added[0], 0.125);
  EXPECT_DOUBLE_EQ(added[1], std::max(0.125, 0.5 * trace / static_cast<double>(width)));
  for (size_t i = 0; i < matrices.size(); ++i) {
    const size_t within = i % (width * width);
    const bool diagonal = within % (width + 1) == 0;
    ASSERT_EQ(matrices[i], static_cast<T>(before[i] + (diagonal ? added[i / (width * width)] : 0)));
  }
}

TEST(CudaDiagonal, LiftsByItsMean) {
  expect_lift<float>(1, DType::kFloat32);
  expect_lift<float>(300, DType::kFloat32);
  expect_lift<double>(7, DType::kFloat64);
}

template <class T>
void expect_shift(int64_t rows, int64_t width, DType dtype) {
  constexpr int64_t kBatch = 2;
  std::vector<T> y(kBatch * rows * width), scale{T(3), T(0.5)};
  const std::vector<double> eigenvalue{16, 4};
  std::vector<double> basis(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] = static_cast<T>(i % 17);
    basis[i] = static_cast<double>(i % 5);
  }
  const std::vector<T> before = y;
  subtract_power_shift(
      {kBatch, rows, width, dtype, y.data(), basis.data(), eigenvalue.data(), scale.data()},
      nullptr);
  for (size_t i = 0; i < y.size(); ++i) {
    const double shift = static_cast<int64_t>(i) < rows * width ? 0.5 * 3 * 16 : 0.5 * 0.5 * 4;
    ASSERT_EQ(y[i], before[i] - static_cast<T>(shift * basis[i])) << i;
  }
}

TEST(CudaPowerShift, SubtractsPerMatrix) {
  expect_shift<float>(5, 3, DType::kFloat32);
  expect_shift<float>(61, 290, DType::kFloat32);  // more than one thread block
  expect_shift<double>(1, 1, DType::kFloat64);
}

TEST(CudaReduce, AddsDoubles) {
  std::vector<double> sums(300, 1.5), values(300);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(i) * 1e-12;
  }
  add_into(sums.data(), values.data(), 299, nullptr);
  for (size_t i = 0; i < 299; ++i) {
    ASSERT_EQ(sums[i], 1.5 + values[i]);
  }
  EXPECT_EQ(sums[299], 1.5);
}

}  // namespace
}  // namespace fips::cuda
