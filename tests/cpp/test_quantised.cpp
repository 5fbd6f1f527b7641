// Slices of codes multiply like the values that the codes stand for, on every instruction set.
#include <gtest/gtest.h>

#include "isa_fixture.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/dense_fill.h"
#include "quantised_slice.h"

namespace fips::testing {
namespace {

class Quantised : public OnEveryIsa {};

std::vector<double> product(BlockSparseMmParams p, const BlockSparseView& v) {
  p.v = v;
  p.x_stride = p.in_features();
  p.out_stride = p.out_features();
  const Elements x(random_vector(p.tokens * p.x_stride, 7), v.dtype);
  Elements y(std::vector<float>(static_cast<size_t>(p.tokens * p.out_stride)), v.dtype);
  p.x = x.data();
  p.out = y.data();
  std::vector<char> workspace(
      static_cast<size_t>(cpu::block_sparse_mm_workspace(p, {}, kManyThreads)));
  EXPECT_TRUE(cpu::block_sparse_mm(p, {}, workspace.data(), kManyThreads));
  std::vector<double> found;
  for (int64_t i = 0; i < p.tokens * p.out_stride; ++i) {
    found.push_back(y[i]);
  }
  return found;
}

TEST_P(Quantised, ProductsAreThoseOfTheValues) {
  // Few blocks are stored, so that no product is one with a filled matrix; many values in each.
  for_each_slice(0.01, [](const QuantisedSlice& slice) {
    for (const int64_t tokens : {1, 3, 12, 40, 130}) {
      for (const bool transpose : {false, true}) {
        BlockSparseMmParams p;
        p.tokens = tokens;
        p.transpose = transpose;
        const std::vector<double> found = product(p, slice.view()),
                                  expected = product(p, slice.plain_view());
        const DType dtype = slice.view().dtype;
        const double rounding = dtype == DType::kBFloat16  ? 1e-2
                                : dtype == DType::kFloat16 ? 2e-3
                                                           : 1e-5;
        for (size_t i = 0; i < found.size(); ++i) {
          ASSERT_NEAR(found[i], expected[i], rounding * (1 + std::fabs(expected[i])))
              << "tokens " << tokens << " transpose " << transpose << " at " << i;
        }
      }
    }
  });
}

TEST_P(Quantised, FillingGivesTheValues) {
  for_each_slice(0.3, [](const QuantisedSlice& slice) {
    const BlockSparseView codes = slice.view(), plain = slice.plain_view();
    check_view(codes, "v");
    const size_t bytes = static_cast<size_t>(kSliceRows * kSliceCols * element_size(codes.dtype));
    std::vector<char> found(bytes, 1), expected(bytes, 2);
    cpu::fill_dense_transposed(codes, found.data(), kManyThreads);
    cpu::fill_dense_transposed(plain, expected.data(), kManyThreads);
    ASSERT_EQ(found, expected);
  });
}

// Whatever block_ptr and the masks say, no code outside the buffer is read (ASan watches).
TEST_P(Quantised, BrokenIndicesStayInBounds) {
  for_each_slice(0.05, [](const QuantisedSlice& slice) {
    BlockSparseView v = slice.view();
    if (!v.is_bitmap() || v.num_blocks < 3) {
      return;
    }
    std::vector<uint8_t> mask(static_cast<size_t>(v.num_blocks * v.slots() / 8), 0xff);
    std::vector<int32_t> block_ptr(v.block_ptr, v.block_ptr + v.num_blocks + 1);
    block_ptr[1] = static_cast<int32_t>(v.num_values) - 1;
    block_ptr[2] = static_cast<int32_t>(v.num_values);
    v.mask = mask.data();
    v.block_ptr = block_ptr.data();
    BlockSparseMmParams p;
    for (const int64_t tokens : {1, 5, 40}) {
      p.tokens = tokens;
      for (const double value : product(p, v)) {
        ASSERT_TRUE(std::isfinite(value));
      }
    }
    EXPECT_THROW(check_view(v, "v"), std::exception);
  });
}

FIPS_INSTANTIATE_ON_EVERY_ISA(Quantised);

}  // namespace
}  // namespace fips::testing
