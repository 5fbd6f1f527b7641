// Runs the decoding kernel of the shared MLP, from its own source, on the CPU
// (csrc/kernels/cuda/emulation.h: all blocks of the grid in turn) against float64 products of dense
// matrices.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "core/pack.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_decode.h"
#include "kernels/cuda/shared_mlp_decode_launch.h"
#include "kernels/cuda/shared_mlp_decode_task.h"

namespace fips::cuda {
namespace {

struct Edges {
  int bk = 32, bn = 32;
};

struct Case {
  int64_t tokens = 3, width = 72, rank = 100, rank_out = 100, hidden = 170;
  Edges up, gate, down;
  bool gated = false, identity = false, biases = true, own_base_out = false;
  bool up_bitmap = false, gate_bitmap = false, down_bitmap = false;
  Activation activation = Activation::kGelu;
  double density = 0.5;
  int skew = 0;  // elements by which pointers and strides miss their alignment
  int sm_count = 3, shared_bytes = 227 * 1024;
  uint32_t seed = 1;
};

Case with_blocks(Edges up, Edges gate, Edges down) {
  Case c;
  c.up = up;
  c.gate = gate;
  c.down = down;
  return c;
}

Case all_bitmap(Case c) {
  c.up_bitmap = c.gate_bitmap = c.down_bitmap = true;
  return c;
}

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Half> = DType::kFloat16;

template <class T>
double rounded(double x) {
  return to_accumulator(FromAccumulator<T>::convert(static_cast<float>(x)));
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kRelu2:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    default:
      return x;
  }
}

using Rows = std::vector<std::vector<double>>;

// Row-major, and exactly what the elements hold.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> value;
  double at(int64_t i, int64_t j) const { return value[i * cols + j]; }
};

// [tokens, rows] * m, or [tokens, cols] * m^T.
Rows multiplied(const Rows& x, const Matrix& m, bool transposed, const std::vector<double>& bias) {
  const int64_t in = transposed ? m.cols : m.rows, out = transposed ? m.rows : m.cols;
  Rows y(x.size(), std::vector<double>(out));
  for (size_t t = 0; t < x.size(); ++t) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = bias.empty() ? 0 : bias[o];
      for (int64_t i = 0; i < in; ++i) {
        sum += x[t][i] * (transposed ? m.at(o, i) : m.at(i, o));
      }
      y[t][o] = sum;
    }
  }
  return y;
}

// Which results between the products are rounded to the element type.
enum class Rounding { kNone, kKernel, kChain };

// A random MLP: the tensors that the kernel reads and the same numbers in float64.
template <class T>
class Problem {
 public:
  explicit Problem(const Case& c_) : c(c_), random_(c_.seed) {
    const int64_t extra = c.identity ? c.width : 0;
    base = dense(c.width, c.rank, base_values);
    base_out = c.own_base_out ? dense(c.width, c.rank_out, base_out_values) : base;
    up = slice(c.rank + extra, c.up, c.up_bitmap, up_slice);
    gate = slice(c.rank + extra, c.gate, c.gate_bitmap, gate_slice);
    down = slice(rank_out() + extra, c.down, c.down_bitmap, down_slice);
    up_bias = vector(c.hidden, up_bias_values);
    gate_bias = vector(c.hidden, gate_bias_values);
    down_bias = vector(c.width, down_bias_values);
    x_stride = c.width + (c.skew != 0 ? c.skew : round_up(c.width, 8) - c.width);
    y_stride = c.width + 3;
    x.resize(c.tokens * x_stride + c.skew);
    for (T& value : x) {
      value = draw(1.0);
    }
    y.resize(c.tokens * y_stride);
  }

  int64_t rank_out() const { return c.own_base_out ? c.rank_out : c.rank; }

  SharedMlpParams params() {
    SharedMlpParams p;
    p.dtype = kDType<T>;
    p.width = c.width;
    p.x = x.data() + c.skew;
    p.tokens = c.tokens;
    p.x_stride = x_stride;
    p.base = base_values.data() + c.skew;
    p.base_out = (c.own_base_out ? base_out_values : base_values).data() + c.skew;
    p.rank = c.rank;
    p.rank_out = rank_out();
    p.identity = c.identity;
    p.up = view(up_slice);
    gate_view_ = view(gate_slice);
    p.gate = c.gated ? &gate_view_ : nullptr;
    p.down = view(down_slice);
    if (c.biases) {
      p.up_bias = up_bias_values.data() + c.skew;
      p.gate_bias = c.gated ? gate_bias_values.data() + c.skew : nullptr;
      p.down_bias = down_bias_values.data() + c.skew;
    }
    p.activation = c.activation;
    p.y = y.data();
    p.y_stride = y_stride;
    return p;
  }

  // Runs the kernel in a workspace of exactly the size that it asks for.
  void run(bool reverse = false, int times = 1) {
    emulation::settings() = {{c.sm_count, 80, c.shared_bytes}, reverse};
    const SharedMlpParams p = params();
    std::vector<uint64_t> workspace(ceil_div(shared_mlp_decode_workspace_bytes(p), 8), ~0ull);
    for (int i = 0; i < times; ++i) {
      memset(y.data(), 0xff, y.size() * sizeof(T));
      shared_mlp_decode(p, workspace.data(), nullptr);
    }
  }

  Rows expected(Rounding rounding) const {
    const auto between = [&](Rows rows, bool also = true) {
      for (auto& row : rows) {
        for (double& value : row) {
          value = rounding != Rounding::kNone && also ? rounded<T>(value) : value;
        }
      }
      return rows;
    };
    const bool chain = rounding == Rounding::kChain;
    Rows in(c.tokens, std::vector<double>(c.width));
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t i = 0; i < c.width; ++i) {
        in[t][i] = to_accumulator(x[c.skew + t * x_stride + i]);
      }
    }
    Rows z = between(multiplied(in, base, false, {}));
    if (c.identity) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        z[t].insert(z[t].end(), in[t].begin(), in[t].end());
      }
    }
    Rows h = between(multiplied(z, up, false, up_bias), chain);
    Rows g = c.gated ? between(multiplied(z, gate, false, gate_bias), chain) : h;
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t i = 0; i < c.hidden; ++i) {
        const double act = activated(c.activation, g[t][i]);
        h[t][i] = c.gated ? (chain ? rounded<T>(act) : act) * h[t][i] : act;
      }
    }
    const Rows w = between(multiplied(between(h), down, true, {}));
    Rows y_wanted = multiplied(w, base_out, true, down_bias);
    for (int64_t t = 0; c.identity && t < c.tokens; ++t) {
      for (int64_t i = 0; i < c.width; ++i) {
        y_wanted[t][i] =
            (chain ? rounded<T>(y_wanted[t][i]) : y_wanted[t][i]) + w[t][rank_out() + i];
      }
    }
    return chain ? between(y_wanted) : y_wanted;
  }

  double got(int64_t token, int64_t i) const { return to_accumulator(y[token * y_stride + i]); }

  Case c;
  int64_t x_stride = 0, y_stride = 0;
  Matrix base, base_out, up, gate, down;
  std::vector<double> up_bias, gate_bias, down_bias;
  PackedSlice up_slice, gate_slice, down_slice;
  std::vector<T> x, y;
  std::vector<T> base_values, base_out_values, up_bias_values, gate_bias_values, down_bias_values;

 private:
  T draw(double scale) {
    return FromAccumulator<T>::convert(normal_(random_) * static_cast<float>(scale));
  }

  Matrix dense(int64_t rows, int64_t cols, std::vector<T>& values) {
    values.resize(c.skew + rows * cols);
    Matrix m{rows, cols, {}};
    for (int64_t i = 0; i < rows * cols; ++i) {
      values[c.skew + i] = draw(1 / std::sqrt(static_cast<double>(rows)));
      m.value.push_back(to_accumulator(values[c.skew + i]));
    }
    return m;
  }

  // Absent blocks, an absent block row and an absent block column; inside stored blocks of a bitmap
  // absent slots as well.
  Matrix slice(int64_t rows, Edges edges, bool bitmap, PackedSlice& packed) {
    const int64_t cols = c.hidden, nbn = ceil_div(cols, edges.bn), nbk = ceil_div(rows, edges.bk);
    std::vector<uint8_t> keep(rows * cols), block(nbn * nbk);
    for (int64_t i = 0; i < nbn * nbk; ++i) {
      const bool empty = (nbn > 2 && i % nbn == 1) || (nbk > 2 && i / nbn == 1);
      block[i] = !empty && uniform_(random_) < c.density;
    }
    std::vector<T> values(rows * cols);
    Matrix m{rows, cols, std::vector<double>(rows * cols)};
    for (int64_t i = 0; i < rows * cols; ++i) {
      keep[i] = block[i / cols / edges.bk * nbn + i % cols / edges.bn] &&
                (!bitmap || uniform_(random_) < 0.5);
      if (keep[i]) {
        values[i] = draw(1 / std::sqrt(c.density * static_cast<double>(rows)));
        m.value[i] = to_accumulator(values[i]);
      }
    }
    packed = pack(values.data(), keep.data(), rows, cols, edges.bk, edges.bn, sizeof(T), bitmap);
    if (c.skew != 0) {
      packed.values.insert(packed.values.begin(), c.skew * sizeof(T), 0);
      packed.mask.insert(packed.mask.begin(), c.skew, 0);
    }
    return m;
  }

  BlockSparseView view(const PackedSlice& slice) const {
    BlockSparseView v = slice.view(kDType<T>);
    v.values = slice.values.data() + c.skew * sizeof(T);
    v.num_values -= c.skew;
    v.mask = slice.bitmap ? slice.mask.data() + c.skew : nullptr;
    return v;
  }

  std::vector<double> vector(int64_t count, std::vector<T>& values) {
    values.resize(c.skew + count);
    std::vector<double> exact;
    for (int64_t i = 0; i < count; ++i) {
      values[c.skew + i] = draw(0.5);
      exact.push_back(c.biases ? to_accumulator(values[c.skew + i]) : 0.0);
    }
    return exact;
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::uniform_real_distribution<double> uniform_;
  BlockSparseView gate_view_;
};

template <class T>
void expect_outputs(const Problem<T>& problem) {
  const Case& c = problem.c;
  const double epsilon = sizeof(T) == 4 ? 2e-6 : kDType<T> == DType::kFloat16 ? 1e-3 : 8e-3;
  const Rows want = problem.expected(Rounding::kKernel);
  double scale = 0;
  for (const auto& row : want) {
    for (const double value : row) {
      scale = std::max(scale, std::abs(value));
    }
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < problem.y_stride; ++i) {
      if (i >= c.width) {
        ASSERT_TRUE(std::isnan(problem.got(t, i))) << "wrote past the row at " << t << ", " << i;
        continue;
      }
      // Sums in another order now and then round z, h or w the other way.
      ASSERT_NEAR(problem.got(t, i), want[t][i], epsilon * (std::abs(want[t][i]) + 0.3 * scale))
          << "token " << t << ", output " << i;
    }
  }
}

template <class T>
void expect_right(const Case& c, bool both_orders = false) {
  SCOPED_TRACE(testing::Message() << dtype_name(kDType<T>) << " tokens " << c.tokens << " up "
                                  << c.up.bk << "x" << c.up.bn << " down " << c.down.bk << "x"
                                  << c.down.bn << " gated " << c.gated << " identity " << c.identity
                                  << " bitmap " << c.up_bitmap << c.down_bitmap);
  Problem<T> problem(c);
  for (int reverse = 0; reverse <= static_cast<int>(both_orders); ++reverse) {
    problem.run(reverse == 1);
    expect_outputs(problem);
  }
}

// ---- every path
// ----------------------------------------------------------------------------------

class EveryDecodeBlock : public testing::TestWithParam<std::tuple<int, int, bool>> {
 protected:
  Case make() const {
    const auto [bk, bn, bitmap] = GetParam();
    Case c = with_blocks({bk, bn}, {bn, bk}, {bn, bk});
    c.rank = 140;
    c.hidden = 150;
    c.sm_count = 2;
    c.gated = (bk + bn) % 3 == 0;
    c.activation = Activation::kSilu;
    return bitmap ? all_bitmap(c) : c;
  }
};

TEST_P(EveryDecodeBlock, BFloat16) { expect_right<BFloat16>(make()); }

TEST_P(EveryDecodeBlock, Float32) {
  Case c = make();
  c.tokens = 9;
  c.sm_count = 1;
  expect_right<float>(c);
}

INSTANTIATE_TEST_SUITE_P(CudaDecode, EveryDecodeBlock,
                         testing::Combine(testing::Values(16, 32, 64, 128),
                                          testing::Values(16, 32, 64, 128), testing::Bool()));

TEST(CudaDecode, EveryCountOfTokensInBothOrders) {
  for (const int64_t tokens : {1, 3, 8, 9, 16}) {
    Case c = with_blocks({64, 32}, {16, 128}, {32, 64});
    c.tokens = tokens;
    c.gated = true;
    c.sm_count = 2;
    expect_right<BFloat16>(c, true);
    expect_right<Half>(c);
    expect_right<float>(all_bitmap(c), tokens == 3);
  }
}

TEST(CudaDecode, EveryActivation) {
  for (const auto activation :
       {Activation::kIdentity, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu,
        Activation::kRelu, Activation::kRelu2, Activation::kQuickGelu}) {
    for (const bool gated : {false, true}) {
      Case c;
      c.activation = activation;
      c.gated = gated;
      c.sm_count = 1;
      expect_right<float>(c);
    }
  }
}

TEST(CudaDecode, IdentityBase) {
  for (const int64_t rank : {40, 0}) {
    for (const bool bitmap : {false, true}) {
      Case c;
      c.identity = true;
      c.gated = bitmap;
      c.rank = rank;
      c.tokens = 10;
      c = bitmap ? all_bitmap(c) : c;
      expect_right<BFloat16>(c, true);
      expect_right<float>(c);
    }
  }
}

TEST(CudaDecode, OwnBaseOfTheOutput) {
  for (const bool identity : {false, true}) {
    Case c;
    c.own_base_out = true;
    c.rank = 64;
    c.rank_out = 41;
    c.identity = identity;
    expect_right<BFloat16>(c);
    expect_right<float>(c);
  }
}

TEST(CudaDecode, MixedEncodings) {
  Case c = with_blocks({64, 64}, {32, 16}, {128, 32});
  c.gated = true;
  c.up_bitmap = c.down_bitmap = true;
  expect_right<BFloat16>(c);
  c.up_bitmap = c.down_bitmap = false;
  c.gate_bitmap = true;
  expect_right<Half>(c);
}

TEST(CudaDecode, UnalignedMemoryAndNoBiases) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.skew = 1;
    c.width = 53;
    c.rank = 61;
    c.biases = false;
    c = bitmap ? all_bitmap(c) : c;
    expect_right<BFloat16>(c);
    expect_right<float>(c);
  }
}

// Long reductions go round every ring, on devices with much and with little shared memory.
TEST(CudaDecode, LongReductions) {
  for (const int shared_bytes : {227 * 1024, 163 * 1024, 99 * 1024}) {
    Case c = with_blocks({64, 64}, {64, 64}, {64, 64});
    c.width = 40;
    c.rank = 800;
    c.hidden = 400;
    c.density = 0.8;
    c.shared_bytes = shared_bytes;
    c.sm_count = 2;
    c.tokens = shared_bytes == 99 * 1024 ? 16 : 2;
    expect_right<BFloat16>(c);
    c.rank = 300;
    c.hidden = 200;
    c.sm_count = 1;
    expect_right<float>(all_bitmap(c));
  }
}

TEST(CudaDecode, AnyNumberOfMultiprocessors) {
  for (const int sm_count : {1, 2, 40}) {
    Case c;
    c.sm_count = sm_count;
    c.gated = true;
    expect_right<BFloat16>(c, true);
  }
}

// Few outputs and long reductions: shares of a tile meet across blocks, in every stage.
TEST(CudaDecode, SharesOfTheReduction) {
  for (const bool bitmap : {false, true}) {
    Case c = with_blocks({64, 64}, {16, 64}, {64, 64});
    c.width = 64;
    c.rank = 400;
    c.hidden = 128;
    c.own_base_out = true;
    c.rank_out = 1100;
    c.gated = true;
    c.density = 1.0;
    c.sm_count = 9;
    c.tokens = bitmap ? 2 : 11;
    c = bitmap ? all_bitmap(c) : c;
    const DecodeTask task = make_decode_task(Problem<BFloat16>(c).params(), c.sm_count);
    EXPECT_GT(task.split[kDecodeStages - 1].shares, 1);
    expect_right<BFloat16>(c, true);
    expect_right<float>(c);
  }
}

TEST(CudaDecode, EmptySlices) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.density = 0;
    expect_right<BFloat16>(bitmap ? all_bitmap(c) : c);
  }
}

TEST(CudaDecode, NoTokens) {
  Case c;
  Problem<float> problem(c);
  SharedMlpParams p = problem.params();
  p.tokens = 0;
  shared_mlp_decode(p, nullptr, nullptr);
}

// ---- promises
// ------------------------------------------------------------------------------------

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(CudaDecode, SameBitsOnEveryRun) {
  Case c;
  c.gated = true;
  c.tokens = 9;
  Problem<BFloat16> problem(c);
  problem.run();
  const auto first = problem.y;
  problem.run(true);
  EXPECT_TRUE(same_bits(problem.y, first)) << "depends on the order of blocks or warps";
  problem.run(false, 3);
  EXPECT_TRUE(same_bits(problem.y, first)) << "depends on what is left in the workspace";
}

// What a graph does: the same launch, nonce included, on the same memory with other tokens. A flag
// left from the last replay would let a block read old features.
TEST(CudaDecode, ReplaysOfOneLaunch) {
  for (const bool reverse : {false, true}) {
    Case c = with_blocks({64, 64}, {64, 64}, {64, 64});
    c.width = 64;
    c.rank = 600;  // stages 0, 2 and 3 in shares
    c.hidden = 700;
    c.sm_count = 7;
    Problem<BFloat16> problem(c);
    emulation::settings() = {{c.sm_count, 80, c.shared_bytes}, reverse};
    DecodeTask task = make_decode_task(problem.params(), c.sm_count);
    std::vector<uint64_t> workspace(ceil_div(plan_workspace(task, 2).bytes, 8), ~0ull);
    bind_workspace(task, workspace.data(), 2);
    task.nonce = 12345;
    for (int replay = 0; replay < 3; ++replay) {
      memset(problem.y.data(), 0xff, problem.y.size() * sizeof(BFloat16));
      launch_decode<BFloat16>(task, c.shared_bytes, nullptr);
      expect_outputs(problem);
      std::rotate(problem.x.begin(), problem.x.begin() + 1, problem.x.end());
    }
  }
}

// A device index cannot be validated on the host without waiting for the GPU: a broken one must be
// skipped. Memory checkers watch the accesses.
TEST(CudaDecode, BrokenIndicesAreSkipped) {
  for (const bool bitmap : {false, true}) {
    Case c;
    c.gated = true;
    Problem<BFloat16> problem(bitmap ? all_bitmap(c) : c);
    constexpr int32_t kFar = std::numeric_limits<int32_t>::max();
    for (PackedSlice* slice : {&problem.up_slice, &problem.gate_slice, &problem.down_slice}) {
      slice->row_idx[0] = kFar;
      slice->col_idx[0] = -5;
      slice->block_id[1] = kFar;
      slice->block_id[2] = -1;
      slice->col_ptr.back() = kFar;
      slice->row_ptr.back() = kFar;
      slice->col_ptr[0] = -9;
      slice->row_ptr[0] = -9;
      if (bitmap) {
        slice->block_ptr[2] = kFar - 3;
        slice->block_ptr[3] = -4;
      }
    }
    problem.run();
    for (int64_t i = 0; i < c.width; ++i) {
      EXPECT_TRUE(std::isfinite(problem.got(0, i))) << i;
    }
  }
}

// Root mean square error against exact arithmetic, as a share of that of a chain of products whose
// results, gate, up and activation included, are all rounded to the element type.
TEST(CudaDecode, NoLessExactThanAChainOfProducts) {
  Case c = with_blocks({32, 32}, {32, 32}, {32, 32});
  c.gated = true;
  c.activation = Activation::kSilu;
  c.tokens = 16;
  c.width = 200;
  Problem<BFloat16> problem(c);
  problem.run();
  const Rows exact = problem.expected(Rounding::kNone), chain = problem.expected(Rounding::kChain);
  double ours = 0, theirs = 0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.width; ++i) {
      ours += std::pow(problem.got(t, i) - exact[t][i], 2);
      theirs += std::pow(chain[t][i] - exact[t][i], 2);
    }
  }
  EXPECT_LE(std::sqrt(ours), 1.1 * std::sqrt(theirs));
}

TEST(CudaDecode, RefusesWhatItCannotRun) {
  Case c;
  Problem<float> problem(c);
  emulation::settings() = {};
  const auto refused = [&](auto change) {
    SharedMlpParams p = problem.params();
    change(p);
    EXPECT_THROW(shared_mlp_decode_workspace_bytes(p), Error);
    EXPECT_THROW(shared_mlp_decode(p, nullptr, nullptr), Error);
  };
  refused([](auto& p) { p.tokens = 17; });
  refused([](auto& p) { p.dtype = DType::kFloat64; });
  refused([](auto& p) { p.dtype = DType::kFloat16; });
  refused([](auto& p) { p.up.rows += 1; });
  refused([](auto& p) { p.down.cols += 1; });
  refused([](auto& p) { p.identity = true; });
  refused([](auto& p) { p.up.bk = 48; });
}

// ---- index maps
// ----------------------------------------------------------------------------------

TEST(CudaDecodeLayout, UnitsOfAllBlocksCoverTheStageEvenly) {
  for (const int outputs : {0, 5, 64, 384, 2048, 2112, 14336, 100000}) {
    for (const int blocks : {1, 3, 132}) {
      const StageSplit split = choose_split(outputs, 32, 100, blocks);
      int end = 0;
      for (int block = 0; block < blocks; ++block) {
        const WorkRange range = units_of(split, block);
        EXPECT_EQ(range.begin, end);
        if (split.units <= blocks && range.begin < range.end) {
          EXPECT_EQ(range.begin, block) << "shares find each other by their block";
        }
        end = range.end;
        EXPECT_LE(std::abs((range.end - range.begin) * blocks - split.units), blocks);
      }
      EXPECT_EQ(end, split.units);
    }
  }
}

TEST(CudaDecodeLayout, SharesCoverTheReduction) {
  for (const int steps : {0, 1, 7, 100}) {
    for (const int shares : {1, 3, 8}) {
      int end = 0;
      for (int share = 0; share < shares; ++share) {
        const WorkRange range = steps_of(steps, share, shares);
        EXPECT_EQ(range.begin, end);
        end = range.end;
      }
      EXPECT_EQ(end, steps);
    }
  }
}

TEST(CudaDecodeLayout, SplitsFillTheDeviceButNeverShareABlock) {
  for (const int64_t outputs : {0, 5, 64, 384, 1152, 2048, 4096, 14336, 28672}) {
    for (const int widest : {16, 32, 64}) {
      for (const int64_t steps : {0, 8, 64, 500}) {
        for (const int64_t blocks : {1, 3, 132}) {
          const StageSplit split = choose_split(outputs, widest, steps, blocks);
          EXPECT_LE(split.out_tile, widest);
          EXPECT_GE(split.out_tile, 16);
          EXPECT_EQ(split.units, ceil_div(outputs, split.out_tile) * split.shares);
          EXPECT_TRUE(split.shares == 1 || split.units <= blocks);
          EXPECT_TRUE(split.shares == 1 || split.shares * kDecodeWarps <= steps);
        }
      }
    }
  }
  // Llama-3-8B on 132 multiprocessors: z = x U, w = h V^T and y = w U^T on nearly all of them.
  EXPECT_EQ(choose_split(2048, 64, 128, 132).units, 128);
  EXPECT_EQ(choose_split(2048, 64, 112, 132).units, 128);
  EXPECT_EQ(choose_split(4096, 32, 32, 132).units, 128);
}

TEST(CudaDecodeLayout, WarpsTakeStepsInTurn) {
  int before = 0;
  std::vector<int> order;
  for (const int steps : {3, 0, 20, 8, 1, 7}) {
    std::vector<int> owner(steps, -1);
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      for (int step = first_step(warp, before); step < steps; step += kDecodeWarps) {
        EXPECT_EQ(owner[step], -1);
        owner[step] = warp;
      }
    }
    order.insert(order.end(), owner.begin(), owner.end());
    before += steps;
  }
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(order[i], static_cast<int>(i % kDecodeWarps));
  }
}

template <class Offset>
void expect_bijection(int rows, int chunks, const Offset& offset) {
  std::set<int> offsets;
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      EXPECT_EQ(offset(row, chunk) % kChunkBytes, 0);
      EXPECT_LT(offset(row, chunk), rows * chunks * kChunkBytes);
      offsets.insert(offset(row, chunk));
    }
  }
  EXPECT_EQ(offsets.size(), size_t(rows) * chunks) << "two chunks share a place";
}

// Eight 16-byte accesses touch every bank once.
void expect_no_conflict(const std::vector<int>& offsets) {
  std::set<int> groups;
  for (const int offset : offsets) {
    groups.insert(offset / kChunkBytes % 8);
  }
  EXPECT_EQ(groups.size(), 8u);
}

TEST(CudaDecodeLayout, StepsAreBijections) {
  expect_bijection(kRowStepOut, 8, [](int out, int chunk) { return row_step_offset(out, chunk); });
  for (const int shift : {1, 2, 3}) {
    expect_bijection(kColumnStepReduce, 1 << shift, [&](int position, int chunk) {
      return column_step_offset(position, chunk, shift);
    });
  }
}

TEST(CudaDecodeLayout, ReadsHaveNoBankConflicts) {
  for (int first = 0; first < 32; first += 8) {  // eight lanes at a time
    std::vector<int> offsets;
    for (const int span : {0, 1}) {  // 16-bit elements
      offsets.clear();
      for (int lane = first; lane < first + 8; ++lane) {
        offsets.push_back(row_step_offset(lane / 4, span * 4 + lane % 4));
      }
      expect_no_conflict(offsets);
    }
    for (const int m : {0, 1}) {
      for (const int shift : {1, 2, 3}) {
        for (int out = 0; out < 1 << shift; out += 2) {
          offsets.clear();
          for (int lane = first; lane < first + 8; ++lane) {
            const Coord at = column_step_row(lane, m);
            offsets.push_back(column_step_offset(at.row, out + at.col, shift));
          }
          expect_no_conflict(offsets);
        }
      }
    }
    for (int chunk = 0; chunk < 8; ++chunk) {  // float32: eight outputs at one chunk
      offsets.clear();
      for (int out = first; out < first + 8; ++out) {
        offsets.push_back(row_step_offset(out, chunk));
      }
      expect_no_conflict(offsets);
    }
  }
}

// Register r of lane 4 g + q after the transposing ldmatrix.x4: rows 2 q and 2 q + 1 of matrix r at
// its column g. For instruction m it must hold output g (+ 8 for odd r) at the positions of words
// 2 m (r < 2) and 2 m + 1 of the lane's 8.
TEST(CudaDecodeLayout, TransposedFragmentsMatchTheFeatures) {
  for (int m = 0; m < 2; ++m) {
    for (int q = 0; q < 4; ++q) {
      for (int r = 0; r < 4; ++r) {
        for (int half = 0; half < 2; ++half) {
          const Coord at = column_step_row(r * 8 + 2 * q + half, m);
          EXPECT_EQ(at.row, 8 * q + 2 * (2 * m + r / 2) + half);
          EXPECT_EQ(at.col, r % 2);
        }
      }
    }
  }
}

// ---- the emulated grid
// ---------------------------------------------------------------------------

struct WaitTask {
  uint64_t* flag;
  bool raise;
};

void wait_for_the_last_block(const WaitTask task) {
  if (block_index() == 2 && task.raise) {
    store_release(task.flag, 1);
  }
  while (load_acquire(task.flag) == 0) {
    spin();
  }
}

TEST(CudaEmulation, BlocksThatWaitForEachOther) {
  for (const bool reverse : {false, true}) {
    emulation::settings() = {{3, 80, 1024}, reverse};
    uint64_t flag = 0;
    emulation::run_grid_together(wait_for_the_last_block, 3, 32, 16, WaitTask{&flag, true});
    flag = 0;
    EXPECT_THROW(
        emulation::run_grid_together(wait_for_the_last_block, 3, 32, 16, WaitTask{&flag, false}),
        Error);
    EXPECT_THROW(
        emulation::run_grid_together(wait_for_the_last_block, 4, 32, 16, WaitTask{&flag, true}),
        Error);
  }
  emulation::settings() = {};
}

}  // namespace
}  // namespace fips::cuda
