// Runs the CUDA kernels of block_sparse_mm, from their own source, on the CPU
// (csrc/kernels/cuda/emulation.h) against a float64 product. Catches wrong indices, masks, missing
// waits and barriers without a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/emulation.h"

namespace fips::cuda {
namespace {

struct Case {
  int64_t tokens = 7, rows = 100, cols = 90;
  int bk = 32, bn = 32;
  bool transposed = false, bitmap = false, bias = true;
  bool tf32 = false;
  int skew = 0;  // elements by which pointers and strides miss their alignment
};

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Half> = DType::kFloat16;

// A random problem, its dense float64 copy, and the tensors a kernel reads.
template <class T>
class Problem {
 public:
  explicit Problem(const Case& c) : c(c), random_(c.tokens * 131 + c.bk * 17 + c.bn) {
    nbk = ceil_div(c.rows, c.bk);
    nbn = ceil_div(c.cols, c.bn);
    dense.assign(c.rows * c.cols, 0.0);
    make_blocks();
    make_transposed_index();
    const int64_t in = c.transposed ? c.cols : c.rows, out = c.transposed ? c.rows : c.cols;
    x_stride = in + (c.skew ? c.skew : 8 - in % 8);
    out_stride = out + 3 + (out + 3) % 2;
    x.resize(c.tokens * x_stride + c.skew);
    for (T& value : x) {
      value = draw();
    }
    bias.resize(out);
    for (T& value : bias) {
      value = draw();
    }
    y.assign(c.tokens * out_stride + 1, poison());
  }

  BlockSparseMmParams params() const {
    BlockSparseMmParams p;
    p.v = {c.rows,
           c.cols,
           c.bk,
           c.bn,
           static_cast<int64_t>(row_idx.size()),
           static_cast<int64_t>(values.size()) - c.skew,
           kDType<T>,
           values.data() + c.skew,
           col_ptr.data(),
           row_idx.data(),
           row_ptr.data(),
           col_idx.data(),
           block_id.data(),
           c.bitmap ? mask.data() : nullptr,
           c.bitmap ? block_ptr.data() : nullptr};
    p.transpose = c.transposed;
    p.x = x.data() + c.skew;
    p.tokens = c.tokens;
    p.x_stride = x_stride;
    p.bias = c.bias ? bias.data() : nullptr;
    p.out = const_cast<T*>(y.data());
    p.out_stride = out_stride;
    p.allow_tf32 = c.tf32;
    return p;
  }

  // The exact output and the sum of its terms' magnitudes, which rounding is measured against.
  std::pair<double, double> expected(int64_t token, int64_t out) const {
    double sum = c.bias ? to_accumulator(bias[out]) : 0.0, magnitude = std::abs(sum);
    for (int64_t i = 0; i < (c.transposed ? c.cols : c.rows); ++i) {
      const double w = c.transposed ? dense[out * c.cols + i] : dense[i * c.cols + out];
      const double term = w * to_accumulator(x[c.skew + token * x_stride + i]);
      sum += term;
      magnitude += std::abs(term);
    }
    return {sum, magnitude};
  }

  static T poison() {
    T value;
    memset(&value, 0xff, sizeof value);
    return value;
  }

  Case c;
  int64_t nbk = 0, nbn = 0, x_stride = 0, out_stride = 0;
  std::vector<double> dense;
  std::vector<T> values, x, bias, y;
  std::vector<int32_t> col_ptr{0}, row_idx, row_ptr, col_idx, block_id, block_ptr{0};
  std::vector<uint8_t> mask;

 private:
  T draw() { return FromAccumulator<T>::convert(normal_(random_)); }

  void make_blocks() {
    values.resize(c.skew);
    for (int64_t column = 0; column < nbn; ++column) {
      for (int64_t row = 0; row < nbk; ++row) {
        if (coin_(random_)) {
          row_idx.push_back(static_cast<int32_t>(row));
          make_block(row, column);
        }
      }
      col_ptr.push_back(static_cast<int32_t>(row_idx.size()));
    }
  }

  void make_block(int64_t row, int64_t column) {
    for (int j = 0; j < c.bn; ++j) {
      for (int k = 0; k < c.bk; ++k) {
        const int64_t r = row * c.bk + k, n = column * c.bn + j;
        const bool inside = r < c.rows && n < c.cols;
        const bool kept = inside && (!c.bitmap || coin_(random_));
        const T value = kept ? draw() : T{};
        if (kept) {
          dense[r * c.cols + n] = to_accumulator(value);
        }
        if (!c.bitmap || kept) {
          values.push_back(value);
        }
        if (k % 8 == 0) {
          mask.push_back(0);
        }
        mask.back() = static_cast<uint8_t>(mask.back() | kept << k % 8);
      }
    }
    block_ptr.push_back(static_cast<int32_t>(values.size()) - c.skew);
  }

  void make_transposed_index() {
    row_ptr.push_back(0);
    for (int64_t row = 0; row < nbk; ++row) {
      for (int64_t column = 0; column < nbn; ++column) {
        for (int32_t b = col_ptr[column]; b < col_ptr[column + 1]; ++b) {
          if (row_idx[b] == row) {
            col_idx.push_back(static_cast<int32_t>(column));
            block_id.push_back(b);
          }
        }
      }
      row_ptr.push_back(static_cast<int32_t>(col_idx.size()));
    }
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::bernoulli_distribution coin_{0.6};
};

// On a device of one multiprocessor the tile is as tall as the tokens fill.
template <class T>
void run(const Problem<T>& problem, const MmEpilogue& epilogue, bool reverse) {
  emulation::settings() = {{1, 80, 227 * 1024}, reverse};
  block_sparse_mm(problem.params(), epilogue, nullptr);
}

template <class T>
void expect_outputs(const Problem<T>& problem) {
  const Case& c = problem.c;
  const double epsilon = sizeof(T) == 4 ? 0 : kDType<T> == DType::kFloat16 ? 1.0 / 2048 : 1.0 / 256;
  for (int64_t token = 0; token < c.tokens; ++token) {
    for (int64_t i = 0; i < problem.out_stride; ++i) {
      const double got = to_accumulator(problem.y[token * problem.out_stride + i]);
      if (i >= (c.transposed ? c.rows : c.cols)) {
        ASSERT_TRUE(std::isnan(got)) << "wrote past the row at " << token << ", " << i;
        continue;
      }
      const auto [want, magnitude] = problem.expected(token, i);
      const double allowed = epsilon * std::abs(want) + (c.tf32 ? 1e-3 : 1e-6) * (magnitude + 1);
      ASSERT_NEAR(got, want, allowed) << "token " << token << ", output " << i;
    }
  }
}

template <class T>
void expect_exact(const Case& c, bool both_orders = true) {
  SCOPED_TRACE(testing::Message() << dtype_name(kDType<T>) << " tokens " << c.tokens << " block "
                                  << c.bk << "x" << c.bn << " transposed " << c.transposed
                                  << " bitmap " << c.bitmap << " skew " << c.skew);
  Problem<T> problem(c);
  for (int reverse = 0; reverse <= static_cast<int>(both_orders); ++reverse) {
    problem.y.assign(problem.y.size(), Problem<T>::poison());
    run(problem, {}, reverse == 1);
    expect_outputs(problem);
  }
}

class EveryBlock : public testing::TestWithParam<std::tuple<int, int, bool, bool>> {
 protected:
  Case make() const {
    Case c;
    std::tie(c.bk, c.bn, c.transposed, c.bitmap) = GetParam();
    c.rows = c.bk + 10;
    c.cols = c.bn + 7;
    return c;
  }
};

TEST_P(EveryBlock, BFloat16) {
  Case c = make();
  expect_exact<BFloat16>(c);
  c.tokens = 50;
  expect_exact<BFloat16>(c, false);
  c.tokens = 101;
  expect_exact<BFloat16>(c, false);
}

TEST_P(EveryBlock, Float32) {
  Case c = make();
  expect_exact<float>(c);
  c.tokens = 50;
  expect_exact<float>(c, false);
}

TEST_P(EveryBlock, TF32) {
  Case c = make();
  c.tf32 = true;
  expect_exact<float>(c);
  c.tokens = 50;
  expect_exact<float>(c, false);
}

INSTANTIATE_TEST_SUITE_P(CudaEmulated, EveryBlock,
                         testing::Combine(testing::Values(16, 32, 64, 128),
                                          testing::Values(16, 32, 64, 128), testing::Bool(),
                                          testing::Bool()));

TEST(CudaEmulated, UnalignedMemory) {
  for (const bool transposed : {false, true}) {
    for (const bool bitmap : {false, true}) {
      Case c;
      c.transposed = transposed;
      c.bitmap = bitmap;
      c.skew = 1;
      c.bias = false;
      expect_exact<BFloat16>(c);
      expect_exact<float>(c);
    }
  }
}

TEST(CudaEmulated, LongReductionManyTokens) {
  Case c;
  c.rows = 700;
  c.bk = 16;
  c.bn = 16;
  c.tokens = 35;
  expect_exact<BFloat16>(c);
  c.bitmap = true;
  expect_exact<BFloat16>(c);
}

TEST(CudaEmulated, Float16) { expect_exact<Half>(Case{}); }

// A device index cannot be validated on the host without waiting for the GPU: a broken one must be
// skipped. Memory checkers watch the accesses; the other outputs must stay right.
TEST(CudaEmulated, BrokenIndicesAreSkipped) {
  for (const bool bitmap : {false, true}) {
    for (const bool transposed : {false, true}) {
      Case c;
      c.transposed = transposed;
      c.bitmap = bitmap;
      Problem<BFloat16> problem(c);
      constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
      problem.row_idx[0] = kFar;
      problem.col_idx[0] = -5;
      problem.block_id[1] = kFar;
      problem.block_id[2] = -1;
      problem.col_ptr.back() = kFar;
      problem.row_ptr.back() = kFar;
      problem.col_ptr[0] = -9;
      problem.row_ptr[0] = -9;
      problem.block_ptr[2] = kFar - 3;
      problem.block_ptr[3] = -4;
      run(problem, {}, false);
      for (int64_t i = 0; i < (transposed ? c.rows : c.cols); ++i) {
        EXPECT_TRUE(std::isfinite(to_accumulator(problem.y[i]))) << i;
      }
    }
  }
}

TEST(CudaEmulated, EmptySlice) {
  Case c;
  Problem<BFloat16> problem(c);
  BlockSparseMmParams params = problem.params();
  params.v.num_blocks = params.v.num_values = 0;
  std::fill(problem.col_ptr.begin(), problem.col_ptr.end(), 0);
  block_sparse_mm(params, {}, nullptr);
  for (int64_t i = 0; i < c.cols; ++i) {
    EXPECT_EQ(to_accumulator(problem.y[i]), to_accumulator(problem.bias[i]));
  }
}

}  // namespace
}  // namespace fips::cuda
