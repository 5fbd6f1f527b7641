#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/philox.h"
#include "core/planner.h"
#include "core/types.h"

namespace fips::testing {
namespace {

TEST(Philox, MatchesThePublishedKnownAnswers) {
  // Philox4x32-10, counter 0 and key 0 (Salmon et al., known-answer tests of the reference
  // distribution).
  const Philox4 zero = philox4x32(0, 0);
  EXPECT_EQ(zero.v[0], 0x6627e8d5u);
  EXPECT_EQ(zero.v[1], 0xe169c58du);
  EXPECT_EQ(zero.v[2], 0xbc57ac4cu);
  EXPECT_EQ(zero.v[3], 0x9b00dbd8u);
}

TEST(Philox, NormalsHaveTheRightMoments) {
  constexpr int kCount = 200000;
  double sum = 0, squares = 0, fourth = 0;
  for (int i = 0; i < kCount; ++i) {
    const NormalPair pair = philox_normals(42, static_cast<uint64_t>(i / 2));
    const double x = i % 2 == 0 ? pair.first : pair.second;
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / kCount, 0.0, 0.01);
  EXPECT_NEAR(squares / kCount, 1.0, 0.015);
  EXPECT_NEAR(fourth / kCount, 3.0, 0.1);
}

TEST(Types, BFloat16RoundsToNearestEven) {
  auto round = [](float x) { return to_accumulator(FromAccumulator<BFloat16>::convert(x)); };
  EXPECT_EQ(round(1.0f), 1.0f);
  EXPECT_EQ(round(1.0f + 1.0f / 256), 1.0f);               // tie to even
  EXPECT_EQ(round(1.0f + 3.0f / 256), 1.0f + 4.0f / 256);  // tie to even, upwards
  EXPECT_EQ(round(-2.5f), -2.5f);
  EXPECT_TRUE(std::isinf(round(INFINITY)));
  EXPECT_TRUE(std::isnan(round(NAN)));
  EXPECT_TRUE(std::isinf(round(3.4e38f)));
}

TEST(Types, HalfConvertsBothWays) {
  for (float x : {0.0f, 1.0f, -0.333251953125f, 65504.0f, 6.103515625e-05f}) {
    EXPECT_EQ(to_accumulator(FromAccumulator<Half>::convert(x)), x);
  }
}

TEST(Planner, StreamsFewTokensAndFillsUpDenseSlices) {
  const MmShape sparse{1024, 250, 100, 10, DType::kFloat32, false};  // density .25
  MmShape shape = sparse;
  EXPECT_EQ(choose_mm_path(shape), MmPath::kSparse);
  shape.stored_slots = 900;
  EXPECT_EQ(choose_mm_path(shape), MmPath::kDensified);
  shape.tokens = 4;
  EXPECT_EQ(choose_mm_path(shape), MmPath::kSparse);
  shape = sparse;
  shape.bitmap = true;
  EXPECT_EQ(choose_mm_path(shape), MmPath::kDensified);
  shape.tokens = 200;
  EXPECT_EQ(choose_mm_path(shape), MmPath::kSparse);
  EXPECT_EQ(choose_sddmm_path(shape), MmPath::kDensified);
  EXPECT_EQ(choose_sddmm_path(sparse), MmPath::kSparse);
}

}  // namespace
}  // namespace fips::testing
