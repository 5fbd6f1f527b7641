// block_sparse_mm with its tokens kept in shared memory, emulated, against float64.
#include <gtest/gtest.h>

#include <limits>

#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_mm_resident.h"
#include "kernels/cuda/block_sparse_mm_resident_plan.h"
#include "kernels/cuda/emulation.h"
#include "mlp_problem.h"

namespace fips::cuda {
namespace {

using fips::testing::exact_activation;
using fips::testing::MlpCase;
using fips::testing::MlpProblem;

// The products z V of an MLP: its x is z here, so the width is the rank.
struct Case : MlpCase {
  int shared_bytes = 227 * 1024;
  int sm_count = 4;
  bool reverse = false;
};

struct Product {
  explicit Product(const Case& c)
      : c(c), mlp(c), out_stride(round_up(c.hidden, 4) + 4), arguments(mlp.params()) {
    gate = mlp.gate.view();
    p.v = mlp.up.view();
    p.x = arguments.x;
    p.tokens = c.tokens;
    p.x_stride = c.rank;
    p.bias = arguments.up_bias;
    out.assign(c.tokens * out_stride, 0xffff);  // NaN
    p.out = out.data();
    p.out_stride = out_stride;
    epilogue = {c.activation, c.gated ? &gate : nullptr, arguments.gate_bias};
    emulation::settings() = {{c.sm_count, 90, c.shared_bytes}, c.reverse};
  }

  double result(int64_t token, int64_t feature) const {
    const uint16_t bits = out[token * out_stride + feature];
    return c.dtype == DType::kBFloat16 ? to_accumulator(BFloat16{bits})
                                       : to_accumulator(Half{bits});
  }

  double expected(int64_t token, int64_t n) const {
    double up = c.bias ? mlp.up_bias[n] : 0, gate_sum = c.bias ? mlp.gate_bias[n] : 0;
    for (int64_t r = 0; r < c.rank; ++r) {
      const double z = mlp.x[token * c.rank + r];
      up += z * mlp.up.exact[r * c.hidden + n];
      gate_sum += z * mlp.gate.exact[r * c.hidden + n];
    }
    return c.gated ? exact_activation(c.activation, gate_sum) * up
                   : exact_activation(c.activation, up);
  }

  void expect_outputs() const {
    const double epsilon = c.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    for (int64_t token = 0; token < c.tokens; ++token) {
      for (int64_t n = 0; n < c.hidden; ++n) {
        const double want = expected(token, n);
        ASSERT_NEAR(result(token, n), want, epsilon * std::abs(want) + 1e-4)
            << "token " << token << ", feature " << n;
      }
      for (int64_t n = c.hidden; n < out_stride; ++n) {
        ASSERT_EQ(out[token * out_stride + n], 0xffff) << "wrote past the row of " << token;
      }
    }
  }

  Case c;
  MlpProblem mlp;
  int64_t out_stride;
  SharedMlpParams arguments;
  BlockSparseView gate;
  std::vector<uint16_t> out;
  BlockSparseMmParams p;
  MmEpilogue epilogue;
};

Case make(int64_t tokens, int64_t rank, int64_t hidden, int bk, int bn) {
  Case c;
  c.tokens = tokens;
  c.width = c.rank = rank;
  c.hidden = hidden;
  c.bk = bk;
  c.bn = bn;
  c.activation = Activation::kIdentity;
  return c;
}

void expect_close(const Case& c) {
  SCOPED_TRACE(::testing::Message()
               << "tokens " << c.tokens << " shape " << c.rank << "x" << c.hidden << " block "
               << c.bk << "x" << c.bn << " gated " << c.gated);
  Product product(c);
  ASSERT_TRUE(resident_supports(product.p, product.epilogue, current_device()));
  block_sparse_mm_resident(product.p, product.epilogue, nullptr);
  product.expect_outputs();
}

TEST(CudaResident, EveryBlockEdge) {
  for (const int bk : {16, 32, 64, 128}) {
    for (const int bn : {16, 32, 64, 128}) {
      Case c = make(5, 72, 90, bk, bn);
      c.density = 0.01;
      expect_close(c);
    }
  }
}

TEST(CudaResident, BothTilesPlainAndGated) {
  for (const bool gated : {false, true}) {
    Case c = make(150, 40, 75, 16, 16);
    c.gated = gated;
    c.activation = gated ? Activation::kSilu : Activation::kGelu;
    expect_close(c);
    c.shared_bytes = 12 * 1024;  // room for 64 tokens only
    c.reverse = true;
    c.dtype = DType::kFloat16;
    expect_close(c);
  }
}

TEST(CudaResident, SharesOfATileCoverAllStrips) {
  Case c = make(70, 16, 700, 16, 32);
  c.sm_count = 132;
  Product product(c);
  ASSERT_GT(plan_resident(resident_query(product.p, product.epilogue, current_device()))->splits,
            1);
  expect_close(c);
}

TEST(CudaResident, ChosenForSmallBlocks) {
  Product product(make(70, 40, 75, 16, 64));
  EXPECT_TRUE(prefers_resident(product.p));
  block_sparse_mm(product.p, product.epilogue, nullptr);
  product.expect_outputs();
  Product large(make(70, 64, 64, 64, 64));
  EXPECT_FALSE(prefers_resident(large.p));
}

// Memory checkers watch the accesses.
TEST(CudaResident, BrokenIndicesStayInBounds) {
  Product product(make(9, 72, 90, 16, 16));
  constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
  fips::PackedSlice& packed = product.mlp.up.packed;
  packed.row_idx[0] = kFar;
  packed.row_idx[1] = -3;
  packed.col_ptr[1] = kFar;
  packed.col_ptr[0] = -kFar;
  product.p.v = product.mlp.up.view();
  block_sparse_mm_resident(product.p, product.epilogue, nullptr);
  for (int64_t n = 0; n < 90; ++n) {
    EXPECT_TRUE(std::isfinite(product.result(0, n)));
  }
}

TEST(CudaResident, RefusesWhatItCannotDo) {
  Product product(make(70, 40, 75, 16, 16));
  const auto takes = [&](const BlockSparseMmParams& p) {
    return resident_supports(p, product.epilogue, current_device());
  };
  EXPECT_TRUE(takes(product.p));
  BlockSparseMmParams bad = product.p;
  bad.transpose = true;
  EXPECT_FALSE(takes(bad));
  bad = product.p;
  bad.x = static_cast<const char*>(product.p.x) + 2;
  EXPECT_FALSE(takes(bad));
  bad = product.p;
  bad.v.rows = 4096;
  EXPECT_FALSE(takes(bad));
  EXPECT_THROW(block_sparse_mm_resident(bad, product.epilogue, nullptr), fips::Error);
}

TEST(ResidentPlan, FillsTheChip) {
  const int hopper = 227 * 1024;
  // DeiT-B, batch 64: 99 tiles of 128 tokens on 132 multiprocessors.
  const ResidentQuery deit{12608, 768, 192, 768 * 3072 / 10, 132, hopper};
  const auto plan = plan_resident(deit);
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->token_tile, 128);
  EXPECT_GE(plan->splits * plan->split_strips, 192);
  EXPECT_FALSE(plan_resident({4096, 2048, 512, 1 << 20, 132, hopper}).has_value());
  EXPECT_EQ(plan_resident({4096, 1024, 512, 1 << 20, 132, hopper})->token_tile, 64);
}

}  // namespace
}  // namespace fips::cuda
