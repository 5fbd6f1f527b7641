// Slices of codes multiply like the values that the codes stand for: on every instruction set, and
// through the CUDA kernel (emulated) that makes values of them.
#include <gtest/gtest.h>

#include <limits>

#include "isa_fixture.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/cuda/dense_fill.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_decode.h"
#include "kernels/dense_fill.h"
#include "quantised_slice.h"

namespace fips::testing {
namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr int64_t kRows = 150, kCols = 170;

class Quantised : public OnEveryIsa {};

template <class F>
void for_each_slice(double density, F&& body) {
  for (const auto& [bk, bn] : {std::pair(16, 16), std::pair(32, 128), std::pair(128, 64)}) {
    for (const bool bitmap : {false, true}) {
      for (const Storage storage : {Storage::kInt8, Storage::kInt4}) {
        for (const DType dtype : kTypes) {
          SCOPED_TRACE(::testing::Message()
                       << bk << "x" << bn << " bitmap=" << bitmap
                       << " int4=" << (storage == Storage::kInt4) << " " << dtype_name(dtype));
          body(QuantisedSlice(kRows, kCols, bk, bn, bitmap, storage, dtype, density, 5));
        }
      }
    }
  }
}

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
    const size_t bytes = static_cast<size_t>(kRows * kCols * element_size(codes.dtype));
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

TEST(CudaQuantised, DequantisingGivesTheValues) {
  cuda::emulation::settings() = {};
  for_each_slice(0.05, [](const QuantisedSlice& slice) {
    const BlockSparseView v = slice.view();
    if (v.dtype == DType::kFloat64) {
      return;
    }
    const int64_t size = element_size(v.dtype), slots = v.slots();
    std::vector<char> values(static_cast<size_t>(v.num_values * size));
    cuda::dequantise(v, values.data(), nullptr);
    const PackedSlice& plain = slice.plain();
    for (int64_t b = 0; b < v.num_blocks; ++b) {
      const int64_t from = plain.bitmap ? plain.block_ptr[b] : b * slots;
      const int64_t to = plain.bitmap ? plain.block_ptr[b + 1] : (b + 1) * slots;
      ASSERT_EQ(std::memcmp(values.data() + slice.first_code(b) * size,
                            plain.values.data() + from * size, (to - from) * size),
                0)
          << "block " << b;
    }
  });
}

// The MLP over one slice for both sides, `v`, in the decoding kernel.
std::vector<double> decoded(const BlockSparseView& v) {
  constexpr int64_t kWidth = 40, kTokens = 3;
  const Elements x(random_vector(kTokens * kWidth, 1), v.dtype),
      base(random_vector(kWidth * kRows, 2), v.dtype);
  Elements y(std::vector<float>(kTokens * kWidth), v.dtype);
  SharedMlpParams p;
  p.dtype = v.dtype;
  p.width = p.x_stride = p.y_stride = kWidth;
  p.tokens = kTokens;
  p.x = x.data();
  p.y = y.data();
  p.base = p.base_out = base.data();
  p.rank = p.rank_out = kRows;
  p.up = p.down = v;
  p.gate = &v;
  p.activation = Activation::kSilu;
  cuda::emulation::settings() = {{3, 80, 227 * 1024}, false};
  std::vector<uint64_t> workspace(
      static_cast<size_t>(ceil_div(cuda::shared_mlp_decode_workspace_bytes(p), 8)));
  cuda::shared_mlp_decode(p, workspace.data(), nullptr);
  std::vector<double> found;
  for (int64_t i = 0; i < kTokens * kWidth; ++i) {
    found.push_back(y[i]);
  }
  return found;
}

TEST(CudaQuantised, DecodingReadsCodes) {
  for_each_slice(0.05, [](const QuantisedSlice& slice) {
    if (slice.view().dtype != DType::kFloat64) {
      ASSERT_EQ(decoded(slice.view()), decoded(slice.plain_view()));
    }
  });
}

TEST(CudaQuantised, BrokenIndicesStayInBounds) {
  for_each_slice(0.05, [](const QuantisedSlice& slice) {
    BlockSparseView v = slice.view();
    if (v.dtype != DType::kBFloat16 || v.num_blocks < 5) {
      return;
    }
    constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
    std::vector<int32_t> row_idx(v.row_idx, v.row_idx + v.num_blocks),
        block_id(v.block_id, v.block_id + v.num_blocks);
    std::vector<int32_t> block_ptr;
    std::vector<uint8_t> mask(static_cast<size_t>(v.num_blocks * v.slots() / 8), 0xff);
    row_idx[0] = kFar;
    row_idx[1] = -5;
    block_id[0] = kFar;
    block_id[1] = -1;
    v.row_idx = row_idx.data();
    v.block_id = block_id.data();
    if (v.is_bitmap()) {
      block_ptr.assign(v.block_ptr, v.block_ptr + v.num_blocks + 1);
      block_ptr[2] = kFar - 3;
      block_ptr[3] = -4;
      v.block_ptr = block_ptr.data();
      v.mask = mask.data();  // more slots than there are codes
    }
    for (const double value : decoded(v)) {
      ASSERT_TRUE(std::isfinite(value));
    }
    std::vector<char> values(static_cast<size_t>(v.num_values * 2));
    cuda::dequantise(v, values.data(), nullptr);
  });
}

}  // namespace
}  // namespace fips::testing
