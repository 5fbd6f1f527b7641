// A random shared MLP for the decoding kernel: blocks of any edges, both encodings, any alignment,
// and y in float64 with the roundings of the kernel or of a chain of products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "core/pack.h"
#include "exact_activation.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_decode.h"

namespace fips::cuda::testing {

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

inline Case with_blocks(Edges up, Edges gate, Edges down) {
  Case c;
  c.up = up;
  c.gate = gate;
  c.down = down;
  return c;
}

inline Case all_bitmap(Case c) {
  c.up_bitmap = c.gate_bitmap = c.down_bitmap = true;
  return c;
}

template <class T>
inline constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Half> = DType::kFloat16;

template <class T>
double rounded(double x) {
  return to_accumulator(FromAccumulator<T>::convert(static_cast<float>(x)));
}

using Rows = std::vector<std::vector<double>>;

// Row-major, and exactly what the elements hold.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> value;
  double at(int64_t i, int64_t j) const { return value[i * cols + j]; }
};

// [tokens, rows] * m, or [tokens, cols] * m^T.
inline Rows multiplied(const Rows& x, const Matrix& m, bool transposed,
                       const std::vector<double>& bias) {
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
        const double act = fips::testing::exact_activation(c.activation, g[t][i]);
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

}  // namespace fips::cuda::testing
