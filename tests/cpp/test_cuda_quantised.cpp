// Slices of codes in the CUDA kernels (emulated): what makes values of them, and what reads them.
#include <gtest/gtest.h>

#include <limits>

#include "kernels/cuda/dense_fill.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_decode.h"
#include "quantised_slice.h"

namespace fips::testing {
namespace {

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
      base(random_vector(kWidth * kSliceRows, 2), v.dtype);
  Elements y(std::vector<float>(kTokens * kWidth), v.dtype);
  SharedMlpParams p;
  p.dtype = v.dtype;
  p.width = p.x_stride = p.y_stride = kWidth;
  p.tokens = kTokens;
  p.x = x.data();
  p.y = y.data();
  p.base = p.base_out = base.data();
  p.rank = p.rank_out = kSliceRows;
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
