// Products in every element type, on every instruction set, against sums in double: few tokens and
// many, both encodings, odd shapes, addresses aligned to nothing but the element, fused epilogues.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "elements.h"
#include "isa_fixture.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/skinny_mm.h"
#include "slices.h"

namespace fips::testing {
namespace {

class ElementTypes : public OnEveryIsa {};

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// Half a unit in the last place of the result, and what float32 sums of this size lose.
double tolerance(DType dtype, double exact) {
  const double rounding = dtype == DType::kBFloat16  ? 1.0 / 256
                          : dtype == DType::kFloat16 ? 1.0 / 2048
                          : dtype == DType::kFloat64 ? 1e-14
                                                     : 1e-6;
  return rounding * std::fabs(exact) + (dtype == DType::kFloat64 ? 1e-12 : 2e-5);
}

// A slice whose values are rounded to `dtype`, dense and packed.
struct TypedSlice {
  TypedSlice(int64_t rows, int64_t cols, int32_t bk, int32_t bn, bool bitmap, DType dtype,
             uint32_t seed)
      : dense(random_dense(rows, cols, 0.3, seed)),
        values(dense.values, dtype),
        packed(fips::pack(values.data(), dense.keep.data(), rows, cols, bk, bn,
                          static_cast<int32_t>(element_size(dtype)), bitmap)) {}

  double at(int64_t k, int64_t j) const { return values[k * dense.cols + j]; }

  DenseSlice dense;
  Elements values;
  PackedSlice packed;
};

double silu(double x) { return x / (1 + std::exp(-x)); }

void expect_product(const TypedSlice& slice, const TypedSlice* gate, DType dtype, bool transpose,
                    int64_t tokens) {
  const int64_t rows = slice.dense.rows, cols = slice.dense.cols;
  const int64_t in = transpose ? cols : rows, out = transpose ? rows : cols;
  const int64_t x_stride = in + 3, out_stride = out + 1;
  Elements x(random_vector(tokens * x_stride, 7), dtype);
  Elements bias(random_vector(out, 8), dtype), gate_bias(random_vector(out, 9), dtype);
  Elements y(std::vector<float>(static_cast<size_t>(tokens * out_stride), -77.0f), dtype);
  BlockSparseMmParams p;
  p.v = slice.packed.view(dtype);
  p.transpose = transpose;
  p.x = x.data();
  p.tokens = tokens;
  p.x_stride = x_stride;
  p.bias = bias.data();
  p.out = y.data();
  p.out_stride = out_stride;
  MmEpilogue epilogue;
  BlockSparseView gate_view;
  if (gate != nullptr) {
    gate_view = gate->packed.view(dtype);
    epilogue = {Activation::kSilu, &gate_view, gate_bias.data()};
  }
  std::vector<char> workspace(
      static_cast<size_t>(cpu::block_sparse_mm_workspace(p, epilogue, kManyThreads)));
  ASSERT_TRUE(cpu::block_sparse_mm(p, epilogue, workspace.data(), kManyThreads));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      auto sum = [&](const TypedSlice& factor, double start) {
        for (int64_t i = 0; i < in; ++i) {
          start += x[t * x_stride + i] * (transpose ? factor.at(o, i) : factor.at(i, o));
        }
        return start;
      };
      double exact = sum(slice, bias[o]), bound = tolerance(dtype, exact);
      if (gate != nullptr) {
        const double up = exact, pre = sum(*gate, gate_bias[o]);
        exact = silu(pre) * up;
        // Each sum may be off by a few float32 roundings of its running value.
        const double off = 1e-6 * std::sqrt(static_cast<double>(in));
        bound = tolerance(dtype, exact) + off * (std::fabs(up) + std::fabs(pre));
      }
      ASSERT_NEAR(y[t * out_stride + o], exact, bound) << "token " << t << " output " << o;
    }
    ASSERT_EQ(y[t * out_stride + out], -77.0) << "padding of token " << t << " was written";
  }
}

TEST_P(ElementTypes, ProductsMatch) {
  constexpr int32_t kBlocks[][2] = {{16, 16}, {32, 64}, {64, 32}, {64, 64}, {128, 16}, {16, 128}};
  for (DType dtype : kTypes) {
    for (const auto& block : kBlocks) {
      for (bool bitmap : {false, true}) {
        const TypedSlice slice(90, 141, block[0], block[1], bitmap, dtype, 31);
        for (int64_t tokens : {1, 2, 8, 9, 16, 17, 45}) {
          for (bool transpose : {false, true}) {
            SCOPED_TRACE(::testing::Message()
                         << dtype_name(dtype) << " " << block[0] << "x" << block[1] << " bitmap="
                         << bitmap << " tokens=" << tokens << " transpose=" << transpose);
            expect_product(slice, nullptr, dtype, transpose, tokens);
          }
        }
      }
    }
  }
}

TEST_P(ElementTypes, GatedEpilogueMatches) {
  for (DType dtype : kTypes) {
    for (bool bitmap : {false, true}) {
      const TypedSlice up(90, 141, 32, 64, bitmap, dtype, 32);
      const TypedSlice gate(90, 141, 32, 64, bitmap, dtype, 33);
      for (int64_t tokens : {1, 3, 16, 70}) {
        SCOPED_TRACE(::testing::Message()
                     << dtype_name(dtype) << " bitmap=" << bitmap << " tokens=" << tokens);
        expect_product(up, &gate, dtype, false, tokens);
      }
    }
  }
}

// Many stored blocks in one column: their tiles are multiplied in several runs.
TEST_P(ElementTypes, SumsOverSeveralRunsOfTiles) {
  for (DType dtype : kTypes) {
    const TypedSlice up(1100, 70, 64, 64, false, dtype, 34),
        gate(1100, 70, 64, 64, false, dtype, 35);
    SCOPED_TRACE(dtype_name(dtype));
    expect_product(up, &gate, dtype, false, 50);
    expect_product(up, nullptr, dtype, false, 50);
  }
}

// Whatever the index and the masks hold, nothing outside is read (ASan looks on) and the caller
// learns of it.
TEST_P(ElementTypes, StrayIndicesAreSkippedAndReported) {
  using Index = std::vector<int32_t> PackedSlice::*;
  constexpr Index kIndices[] = {&PackedSlice::col_ptr, &PackedSlice::row_idx, &PackedSlice::row_ptr,
                                &PackedSlice::col_idx, &PackedSlice::block_id};
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int32_t edge : {16, 32, 64}) {
      for (bool bitmap : {false, true}) {
        const TypedSlice slice(150, 141, edge, edge, bitmap, dtype, 21);
        for (int64_t tokens : {1, 2, 5, 9, 16, 17}) {
          for (bool transpose : {false, true}) {
            SCOPED_TRACE(::testing::Message()
                         << dtype_name(dtype) << " " << edge << " bitmap=" << bitmap
                         << " tokens=" << tokens << " transpose=" << transpose);
            const int64_t in = transpose ? 141 : 150, out = transpose ? 150 : 141;
            Elements x(random_vector(tokens * in, 22), dtype);
            Elements y(std::vector<float>(static_cast<size_t>(tokens * out)), dtype);
            // The damaged slice as the factor itself, or as its gate.
            auto run = [&](const PackedSlice& damaged, bool as_gate) {
              const BlockSparseView whole = slice.packed.view(dtype), bad = damaged.view(dtype);
              BlockSparseMmParams p;
              p.v = as_gate ? whole : bad;
              p.transpose = transpose;
              p.x = x.data();
              p.tokens = tokens;
              p.x_stride = in;
              p.out = y.data();
              p.out_stride = out;
              MmEpilogue epilogue;
              epilogue.gate = as_gate ? &bad : nullptr;
              std::vector<char> workspace(
                  static_cast<size_t>(cpu::block_sparse_mm_workspace(p, epilogue, kManyThreads)));
              return cpu::block_sparse_mm(p, epilogue, workspace.data(), kManyThreads);
            };
            for (bool as_gate : transpose ? std::vector<bool>{false} : std::vector{false, true}) {
              for (int32_t value : {-1, 1 << 30}) {
                for (Index index : kIndices) {
                  PackedSlice damaged = slice.packed;
                  (damaged.*index)[1] = value;
                  const bool used = transpose != (index == kIndices[0] || index == kIndices[1]);
                  EXPECT_EQ(run(damaged, as_gate), !used);
                }
              }
              if (bitmap) {
                PackedSlice damaged = slice.packed;
                damaged.block_ptr[1] = 1 << 30;
                EXPECT_FALSE(run(damaged, as_gate));
                damaged = slice.packed;
                std::fill(damaged.mask.begin(), damaged.mask.end(), 0xff);
                EXPECT_TRUE(run(damaged, as_gate));
              }
            }
          }
        }
      }
    }
  }
}

// Bit for bit, whatever the number of threads: every output is summed by one of them, in one order.
TEST_P(ElementTypes, ThreadsDoNotChangeTheResult) {
  for (DType dtype : kTypes) {
    for (bool bitmap : {false, true}) {
      const TypedSlice slice(300, 333, 32, 32, bitmap, dtype, 51);
      for (int64_t tokens : {1, 8, 300}) {
        for (bool transpose : {false, true}) {
          const int64_t in = transpose ? 333 : 300, out = transpose ? 300 : 333;
          Elements x(random_vector(tokens * in, 52), dtype);
          auto run = [&](const Parallel& parallel) {
            Elements y(std::vector<float>(static_cast<size_t>(tokens * out)), dtype);
            BlockSparseMmParams p;
            p.v = slice.packed.view(dtype);
            p.transpose = transpose;
            p.x = x.data();
            p.tokens = tokens;
            p.x_stride = in;
            p.out = y.data();
            p.out_stride = out;
            std::vector<char> workspace(
                static_cast<size_t>(cpu::block_sparse_mm_workspace(p, {}, parallel)));
            EXPECT_TRUE(cpu::block_sparse_mm(p, {}, workspace.data(), parallel));
            return y;
          };
          const Elements one = run(kSerial), many = run(kManyThreads);
          EXPECT_EQ(std::memcmp(one.data(), many.data(),
                                static_cast<size_t>(tokens * out * element_size(dtype))),
                    0)
              << dtype_name(dtype) << " bitmap=" << bitmap << " tokens=" << tokens
              << " transpose=" << transpose;
        }
      }
    }
  }
}

TEST_P(ElementTypes, SampledProductsMatch) {
  constexpr int32_t kBlocks[][2] = {{16, 32}, {64, 16}, {128, 128}};
  for (DType dtype : kTypes) {
    for (const auto& block : kBlocks) {
      const TypedSlice slice(90, 141, block[0], block[1], false, dtype, 61);
      for (int64_t tokens : {0, 1, 2, 67, 130}) {
        const int64_t a_stride = 93, b_stride = 150;
        Elements a(random_vector(tokens * a_stride, 62), dtype);
        Elements b(random_vector(tokens * b_stride, 63), dtype);
        const DType sum_type = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
        Elements sums(std::vector<float>(static_cast<size_t>(slice.packed.num_values()), 0.5f),
                      sum_type);
        BlockSparseSddmmParams p;
        p.v = slice.packed.view(dtype);
        p.a = a.data();
        p.a_stride = a_stride;
        p.b = b.data();
        p.b_stride = b_stride;
        p.tokens = tokens;
        p.out = sums.data();
        p.accumulate = true;
        cpu::block_sparse_sddmm(p, kManyThreads);
        const BlockSparseView& v = p.v;
        int64_t edge = 0;
        for (int64_t i = 0; i < v.num_blocks; ++i) {
          while (v.col_ptr[edge + 1] <= i) {
            ++edge;
          }
          for (int64_t slot = 0; slot < v.slots(); ++slot) {
            const int64_t j = edge * v.bn + slot / v.bk, k = v.row_idx[i] * v.bk + slot % v.bk;
            double exact = 0.5;
            for (int64_t t = 0; t < tokens && j < 141 && k < 90; ++t) {
              exact += a[t * a_stride + k] * b[t * b_stride + j];
            }
            ASSERT_NEAR(sums[i * v.slots() + slot], exact, tolerance(sum_type, exact))
                << dtype_name(dtype) << " " << block[0] << "x" << block[1] << " tokens=" << tokens
                << " block " << i << " slot " << slot;
          }
        }
      }
    }
  }
}

void expect_skinny_products(int64_t rows, int64_t cols) {
  const int64_t stride = 320;
  for (DType dtype : kTypes) {
    Elements matrix(random_vector(rows * cols, 41), dtype);
    for (bool transpose : {false, true}) {
      for (int64_t tokens : {1, 2, 3, 7, 16, 57}) {
        SCOPED_TRACE(::testing::Message()
                     << dtype_name(dtype) << " tokens=" << tokens << " transpose=" << transpose);
        const int64_t in = transpose ? cols : rows, out = transpose ? rows : cols;
        Elements x(random_vector(tokens * stride, 42), dtype), bias(random_vector(out, 43), dtype);
        Elements addend(random_vector(tokens * stride, 44), dtype);
        Elements y(std::vector<float>(static_cast<size_t>(tokens * stride), -77.0f), dtype);
        SkinnyMmParams p;
        p.dtype = dtype;
        p.matrix = matrix.data();
        p.rows = rows;
        p.cols = cols;
        p.transpose = transpose;
        p.x = x.data();
        p.tokens = tokens;
        p.x_stride = p.addend_stride = p.out_stride = stride;
        p.bias = transpose ? bias.data() : nullptr;
        p.addend = transpose ? addend.data() : nullptr;
        p.out = y.data();
        std::vector<char> workspace(static_cast<size_t>(cpu::skinny_mm_workspace(p)));
        cpu::skinny_mm(p, workspace.data(), kManyThreads);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t o = 0; o < out; ++o) {
            double exact = transpose ? bias[o] + addend[t * stride + o] : 0.0;
            for (int64_t i = 0; i < in; ++i) {
              exact += x[t * stride + i] * matrix[transpose ? o * cols + i : i * cols + o];
            }
            ASSERT_NEAR(y[t * stride + o], exact, tolerance(dtype, exact))
                << "token " << t << " output " << o;
          }
          ASSERT_EQ(y[t * stride + out], -77.0) << "padding of token " << t << " was written";
        }
      }
    }
  }
}

TEST_P(ElementTypes, SkinnyProductsMatch) {
  expect_skinny_products(77, 301);  // nothing fits a register
  expect_skinny_products(96, 288);  // everything does
  expect_skinny_products(16, 32);
}

FIPS_INSTANTIATE_ON_EVERY_ISA(ElementTypes);

}  // namespace
}  // namespace fips::testing
