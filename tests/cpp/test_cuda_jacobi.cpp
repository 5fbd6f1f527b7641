// The Jacobi kernels' own source, run on the CPU (csrc/kernels/cuda/emulation.h): every property of
// a singular value decomposition, checked in float64 against the input.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "kernels/cuda/emulation.h"
#include "kernels/cuda/jacobi.h"
#include "kernels/cuda/jacobi_plan.h"

namespace fips::cuda {
namespace {

using Matrix = std::vector<double>;  // row-major

Matrix random_matrix(int rows, int columns, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix m(static_cast<size_t>(rows) * columns);
  for (double& x : m) {
    x = normal(random);
  }
  return m;
}

Matrix product(const Matrix& a, const Matrix& b, int rows, int inner, int columns) {
  Matrix c(static_cast<size_t>(rows) * columns, 0.0);
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < inner; ++k) {
      for (int j = 0; j < columns; ++j) {
        c[i * columns + j] += a[i * inner + k] * b[k * columns + j];
      }
    }
  }
  return c;
}

// Rows of a random matrix, made orthonormal.
Matrix orthogonal(int n, unsigned seed) {
  Matrix q = random_matrix(n, n, seed);
  for (int i = 0; i < n; ++i) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int j = 0; j < i; ++j) {
        const double along = std::inner_product(&q[i * n], &q[i * n] + n, &q[j * n], 0.0);
        for (int k = 0; k < n; ++k) {
          q[i * n + k] -= along * q[j * n + k];
        }
      }
    }
    const double norm = std::sqrt(std::inner_product(&q[i * n], &q[i * n] + n, &q[i * n], 0.0));
    for (int k = 0; k < n; ++k) {
      q[i * n + k] /= norm;
    }
  }
  return q;
}

// Random singular vectors around `values`.
Matrix with_spectrum(const std::vector<double>& values, unsigned seed) {
  const int n = static_cast<int>(values.size());
  Matrix left = orthogonal(n, seed);
  for (int i = 0; i < n * n; ++i) {
    left[i] *= values[i % n];
  }
  return product(left, orthogonal(n, seed + 1), n, n, n);
}

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
template <class T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();

template <class T>
struct Svd {
  std::vector<T> left, values, right;
};

// Outputs start as NaN and the workspace ends where its size says.
template <class T>
Svd<T> decompose(const std::vector<T>& matrices, int batch, int vectors, int length, bool left) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Svd<T> svd{std::vector<T>(left ? batch * vectors * vectors : 0, nan),
             std::vector<T>(batch * vectors, nan), std::vector<T>(batch * vectors * length, nan)};
  JacobiParams params;
  params.batch = batch;
  params.vectors = vectors;
  params.length = length;
  params.dtype = kDType<T>;
  params.matrices = matrices.data();
  params.left = left ? svd.left.data() : nullptr;
  params.values = svd.values.data();
  params.right = svd.right.data();
  void* workspace = nullptr;
  const int64_t bytes = jacobi_workspace_bytes(params);
  EXPECT_EQ(posix_memalign(&workspace, 16, static_cast<size_t>(bytes)), 0);
  memset(workspace, 0xff, static_cast<size_t>(bytes));
  jacobi_svd(params, workspace, nullptr);
  free(workspace);
  return svd;
}

template <class T>
void expect_orthonormal_rows(const T* rows, int count, int length, const char* name) {
  const double tolerance = kEpsilon<T> * (16 + 2 * std::sqrt(length) + count / 8.0);
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j <= i; ++j) {
      const double dot =
          std::inner_product(rows + i * length, rows + (i + 1) * length, rows + j * length, 0.0);
      ASSERT_NEAR(dot, i == j, tolerance) << name << " rows " << i << " and " << j;
    }
  }
}

template <class T>
void expect_svd(const T* matrix, const Svd<T>& svd, int index, int vectors, int length) {
  const T* values = &svd.values[index * vectors];
  const T* right = &svd.right[index * vectors * length];
  for (int i = 1; i < vectors; ++i) {
    ASSERT_GE(values[i - 1], values[i]);
  }
  ASSERT_GE(values[vectors - 1], 0);
  expect_orthonormal_rows(right, vectors, length, "right");
  if (svd.left.empty()) {
    return;
  }
  const T* left = &svd.left[index * vectors * vectors];
  expect_orthonormal_rows(left, vectors, vectors, "left");
  const double allowed = kEpsilon<T> * (16 + 2 * vectors) * values[0];
  for (int i = 0; i < vectors; ++i) {
    for (int j = 0; j < length; ++j) {
      double rebuilt = 0;
      for (int k = 0; k < vectors; ++k) {
        rebuilt += static_cast<double>(left[k * vectors + i]) * values[k] * right[k * length + j];
      }
      ASSERT_NEAR(matrix[i * length + j], rebuilt, allowed) << i << ", " << j;
    }
  }
}

// A device whose thread blocks have the memory to hold whole matrices, or only few rows.
constexpr DeviceInfo kLarge{132, 90, 227 * 1024};
constexpr DeviceInfo kSmall{132, 86, 2 * 1024};

template <class T>
Svd<T> check(const Matrix& exact, int vectors, int length, bool left = true,
             const DeviceInfo& device = kLarge, bool reverse = false) {
  SCOPED_TRACE(testing::Message() << dtype_name(kDType<T>) << " " << vectors << "x" << length);
  emulation::settings() = {device, reverse};
  const std::vector<T> matrix(exact.begin(), exact.end());
  const Svd<T> svd = decompose(matrix, 1, vectors, length, left);
  expect_svd(matrix.data(), svd, 0, vectors, length);
  return svd;
}

template <class T>
void expect_values(const Svd<T>& svd, const std::vector<double>& exact) {
  for (size_t i = 0; i < exact.size(); ++i) {
    ASSERT_NEAR(svd.values[i], exact[i], kEpsilon<T> * (8 + 2.0 * exact.size()) * exact[0]) << i;
  }
}

TEST(JacobiPlan, ATournamentMeetsEveryPairOnce) {
  for (int players = 2; players <= 12; players += 2) {
    std::set<std::pair<int, int>> met;
    for (int round = 0; round < players - 1; ++round) {
      std::set<int> busy;
      for (int i = 0; i < players / 2; ++i) {
        const RowPair p = tournament_pair(players, round, i);
        EXPECT_TRUE(busy.insert(p.first).second && busy.insert(p.second).second);
        EXPECT_TRUE(met.insert(std::minmax(p.first, p.second)).second);
      }
      EXPECT_EQ(busy.size(), static_cast<size_t>(players));
    }
    EXPECT_EQ(met.size(), static_cast<size_t>(players * (players - 1) / 2));
  }
}

TEST(JacobiPlan, FitsTheDevice) {
  for (const int memory : {8 * 1024, 99 * 1024, 163 * 1024, 227 * 1024}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
      for (int vectors = 1; vectors <= 512; vectors += 7) {
        for (const int batch : {1, 40, 1000}) {
          const JacobiPlan p =
              plan_jacobi(batch, vectors, vectors, vectors % 2 == 0, dtype, {132, 90, memory});
          if (p.groups == 0) {
            EXPECT_EQ(memory, 8 * 1024);  // two rows of 512 float64 and their left vectors
            EXPECT_GE(vectors, 256);
            continue;
          }
          EXPECT_LE(p.shared_bytes, memory);
          EXPECT_EQ(p.groups % 2, 0);
          EXPECT_GE(p.groups * p.group, vectors);
          EXPECT_TRUE(p.warps >= 1 && p.warps <= kJacobiWarps);
          EXPECT_EQ(p.stride * element_size(dtype) % 16, 0);
        }
      }
    }
  }
}

TEST(CudaJacobi, RandomMatricesOfManySizes) {
  for (const int n : {1, 2, 3, 17, 32}) {
    const Matrix m = random_matrix(n, n, 10 + n);
    check<float>(m, n, n, true, kLarge, n % 2 == 0);
    check<double>(m, n, n, true, kLarge, n % 2 == 1);
  }
  check<float>(random_matrix(40, 64, 1), 40, 64);
  check<float>(random_matrix(13, 50, 2), 13, 50);
  check<double>(random_matrix(6, 9, 3), 6, 9);
}

TEST(CudaJacobi, SingularValues) {
  std::vector<double> values(24);
  for (int i = 0; i < 24; ++i) {
    values[i] = 100 * std::pow(i + 1, -1.3);
  }
  expect_values(check<float>(with_spectrum(values, 4), 24, 24), values);
  expect_values(check<double>(with_spectrum(values, 5), 24, 24), values);
}

// Groups of rows, a launch per round.
TEST(CudaJacobi, MatricesLargerThanSharedMemory) {
  for (const int n : {21, 24}) {
    check<float>(random_matrix(n, n, n), n, n, true, kSmall, n % 2 == 0);
  }
  check<double>(random_matrix(14, 14, 6), 14, 14, true, kSmall);
  check<float>(random_matrix(33, 33, 7), 33, 33, false, kSmall);
  check<float>(product(random_matrix(24, 5, 1), random_matrix(5, 24, 2), 24, 5, 24), 24, 24, true,
               kSmall);
}

TEST(CudaJacobi, LargeMatrix) { check<float>(random_matrix(80, 80, 8), 80, 80, false); }

TEST(CudaJacobi, DiagonalAndIdentity) {
  const int n = 19;
  Matrix diagonal(n * n, 0.0), identity(n * n, 0.0);
  std::vector<double> sorted(n);
  for (int i = 0; i < n; ++i) {
    diagonal[i * (n + 1)] = (i * 7 % n + 1) * (i % 2 == 0 ? 1 : -1);
    identity[i * (n + 1)] = 1;
    sorted[i] = n - i;
  }
  expect_values(check<float>(diagonal, n, n), sorted);
  expect_values(check<double>(identity, n, n), std::vector<double>(n, 1.0));
}

TEST(CudaJacobi, RepeatedValues) {
  const std::vector<double> values{5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1};
  expect_values(check<float>(with_spectrum(values, 9), 16, 16), values);
  expect_values(check<double>(with_spectrum(values, 9), 16, 16), values);
}

TEST(CudaJacobi, GradedSpectrum) {
  std::vector<double> values(25);
  for (int i = 0; i < 25; ++i) {
    values[i] = std::pow(10.0, 6 - i / 2.0);
  }
  expect_values(check<float>(with_spectrum(values, 11), 25, 25), values);
  expect_values(check<double>(with_spectrum(values, 12), 25, 25), values);
}

// The factors of a rank-deficient matrix are bases all the same.
TEST(CudaJacobi, RankDeficient) {
  for (const int n : {1, 12}) {
    check<float>(Matrix(n * n, 0.0), n, n);
    check<double>(Matrix(n * n, 0.0), n, n);
    check<float>(Matrix(n * n, 1.0), n, n);
  }
  const Matrix low = product(random_matrix(30, 4, 1), random_matrix(4, 35, 2), 30, 4, 35);
  check<float>(low, 30, 35, true, kLarge, true);
  check<double>(low, 30, 35);
  Matrix twice = random_matrix(12, 12, 3);
  std::copy_n(&twice[0], 12, &twice[12 * 7]);
  std::fill_n(&twice[12 * 3], 12, 0.0);
  check<float>(twice, 12, 12);
}

TEST(CudaJacobi, AnyScale) {
  for (const double scale : {1e-38, 1e-20, 1e20, 1e37}) {
    Matrix m = random_matrix(9, 9, 5);
    for (double& x : m) {
      x *= scale;
    }
    check<float>(m, 9, 9);
  }
  Matrix m = random_matrix(7, 7, 6);
  for (double& x : m) {
    x *= 1e-300;
  }
  check<double>(m, 7, 7);
}

TEST(CudaJacobi, BatchMembersAreIndependentAndOrderOfWarpsDoesNotMatter) {
  const int n = 20, batch = 3;
  const Matrix exact = random_matrix(batch * n, n, 13);
  std::vector<float> matrices(exact.begin(), exact.end());
  std::fill_n(&matrices[n * n], n * n, 0.0f);  // needs no sweep, its neighbours do
  for (const DeviceInfo& device : {kLarge, kSmall}) {
    emulation::settings() = {device, false};
    const Svd<float> together = decompose(matrices, batch, n, n, true);
    emulation::settings() = {device, true};
    const Svd<float> reversed = decompose(matrices, batch, n, n, true);
    EXPECT_EQ(together.values, reversed.values);
    EXPECT_EQ(together.left, reversed.left);
    EXPECT_EQ(together.right, reversed.right);
    for (int b = 0; b < batch; ++b) {
      expect_svd(&matrices[b * n * n], together, b, n, n);
    }
  }
}

TEST(CudaJacobi, NothingToDo) {
  EXPECT_TRUE(decompose(std::vector<float>{}, 0, 4, 4, true).values.empty());
}

TEST(CudaJacobi, NansEnd) {
  emulation::settings() = {kLarge, false};
  std::vector<float> matrix(36, 1.0f);
  matrix[8] = std::numeric_limits<float>::quiet_NaN();
  decompose(matrix, 1, 6, 6, true);
}

TEST(CudaJacobi, RefusesWhatItCannotHold) {
  JacobiParams params;
  params.batch = 1;
  params.vectors = params.length = 513;
  EXPECT_THROW(jacobi_svd(params, nullptr, nullptr), Error);
  params.vectors = 8;
  params.length = 7;
  EXPECT_THROW(jacobi_svd(params, nullptr, nullptr), Error);
  params.length = 1 << 20;
  EXPECT_THROW(jacobi_workspace_bytes(params), Error);
  params.dtype = DType::kBFloat16;
  EXPECT_THROW(jacobi_workspace_bytes(params), Error);
}

}  // namespace
}  // namespace fips::cuda
