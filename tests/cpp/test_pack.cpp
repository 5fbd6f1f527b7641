#include <gtest/gtest.h>

#include "core/format.h"
#include "slices.h"

namespace fips::testing {
namespace {

TEST(Pack, RoundTripsEveryBlockShape) {
  for (int32_t bk : {16, 32, 64, 128}) {
    for (int32_t bn : {16, 32, 64, 128}) {
      for (bool bitmap : {false, true}) {
        const DenseSlice dense = random_dense(131, 77, 0.2, 1);
        const PackedSlice slice = pack(dense, bk, bn, bitmap);
        std::vector<float> back(dense.values.size(), -1.0f);
        unpack(slice, back.data());
        EXPECT_EQ(back, dense.values) << bk << "x" << bn << " bitmap=" << bitmap;
        EXPECT_NO_THROW(check_view(slice.view(DType::kFloat32), "v"));
      }
    }
  }
}

TEST(Pack, StoresOnlyKeptSlotsInABitmap) {
  const DenseSlice dense = random_dense(64, 64, 0.5, 2);
  int64_t kept = 0;
  for (uint8_t keep : dense.keep) {
    kept += keep;
  }
  EXPECT_EQ(pack(dense, 32, 32, true).num_values(), kept);
  EXPECT_EQ(pack(dense, 32, 32, false).num_values(), 64 * 64);
}

TEST(Pack, CountsStoredBytes) {
  const DenseSlice dense = random_dense(32, 32, 1.0, 3);
  // 2 block columns of 2 blocks: 3 pointers, 4 row indices, all values; the bitmap adds one bit per
  // slot.
  EXPECT_EQ(pack(dense, 16, 16, false).stored_bytes(), 4 * 1024 + 4 * (3 + 4));
  EXPECT_EQ(pack(dense, 16, 16, true).stored_bytes(), 4 * 1024 + 4 * (3 + 4) + 1024 / 8);
}

TEST(Pack, AnEmptySliceIsValid) {
  const DenseSlice dense = random_dense(20, 30, 0.0, 4);
  for (bool bitmap : {false, true}) {
    const PackedSlice slice = pack(dense, 16, 16, bitmap);
    EXPECT_EQ(slice.num_blocks(), 0);
    EXPECT_EQ(slice.view(DType::kFloat32).is_bitmap(), bitmap);
    EXPECT_NO_THROW(check_view(slice.view(DType::kFloat32), "v"));
  }
}

TEST(Pack, RefusesBlocksThatAreNotAllowed) {
  const DenseSlice dense = random_dense(20, 30, 0.5, 5);
  EXPECT_THROW(pack(dense, 8, 16, false), Error);
  EXPECT_THROW(pack(dense, 16, 256, false), Error);
}

TEST(Pack, RefusesFallingPointersBeforeReadingThroughThem) {
  PackedSlice slice = pack(random_dense(32, 32, 1.0, 7), 16, 16, false);
  slice.col_ptr = {0, 400, 4};
  EXPECT_THROW(derive_index(slice), Error);
}

class CheckView : public ::testing::Test {
 protected:
  PackedSlice slice = pack(random_dense(70, 90, 0.3, 6), 16, 32, true);
  void expect_refused() { EXPECT_THROW(check_view(slice.view(DType::kFloat32), "v"), Error); }
};

TEST_F(CheckView, RefusesARowIndexOutsideTheGrid) {
  slice.row_idx.back() = 1000;
  expect_refused();
}
TEST_F(CheckView, RefusesANegativeColumn) {
  slice.col_idx.front() = -1;
  expect_refused();
}
TEST_F(CheckView, RefusesABlockThatIsNotStored) {
  slice.block_id.front() = static_cast<int32_t>(slice.num_blocks());
  expect_refused();
}
TEST_F(CheckView, RefusesATransposedIndexOfOtherBlocks) {
  std::swap(slice.block_id.front(), slice.block_id.back());
  expect_refused();
}
TEST_F(CheckView, RefusesARepeatedRow) {
  slice.row_idx[1] = slice.row_idx[0];
  expect_refused();
}
TEST_F(CheckView, RefusesFallingPointers) {
  slice.col_ptr[1] = slice.col_ptr.back() + 1;
  expect_refused();
}
TEST_F(CheckView, RefusesAMaskThatKeepsMoreThanItsValues) {
  slice.mask[0] ^= 0xff;
  slice.mask[1] |= 0xff;
  expect_refused();
}
TEST_F(CheckView, RefusesMissingValues) {
  slice.values.resize(slice.values.size() - 4);
  expect_refused();
}

}  // namespace
}  // namespace fips::testing
