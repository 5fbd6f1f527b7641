// A random shared MLP, its raw-pointer arguments, and y in float64.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "elements.h"
#include "exact_activation.h"
#include "kernels/shared_mlp.h"
#include "slices.h"

namespace fips::testing {

struct MlpCase {
  int64_t tokens = 5, width = 32, rank = 32, rank_out = 32, hidden = 100;
  int bk = 16, bn = 16;
  int gate_bk = 0;  // of the gate alone; 0: bk
  DType dtype = DType::kBFloat16;
  bool gated = false, bias = true, shared_base = false;
  Activation activation = Activation::kGelu;
  double density = 0.02;  // of elements: a good part of the blocks
};

// A slice with elements of any type: `pack` moves raw elements.
struct TypedSlice {
  TypedSlice(const DenseSlice& dense, const MlpCase& c, int bk = 0) : dtype(c.dtype) {
    const Elements typed(dense.values, c.dtype);
    for (int64_t i = 0; i < dense.rows * dense.cols; ++i) {
      exact.push_back(typed[i]);
    }
    packed =
        fips::pack(typed.data(), dense.keep.data(), dense.rows, dense.cols, bk == 0 ? c.bk : bk,
                   c.bn, static_cast<int32_t>(element_size(c.dtype)), false);
  }
  BlockSparseView view() const { return packed.view(dtype); }

  DType dtype;
  PackedSlice packed;
  std::vector<double> exact;  // [rows, cols]
};

class MlpProblem {
 public:
  explicit MlpProblem(const MlpCase& c)
      : c(c),
        x(random_vector(c.tokens * c.width, 1), c.dtype),
        base(scaled(c.width * c.rank, 2, c.width), c.dtype),
        base_out(scaled(c.width * c.rank_out, 3, c.rank_out), c.dtype),
        up(random_dense(c.rank, c.hidden, c.density, 4), c),
        gate(random_dense(c.rank, c.hidden, c.density, 5), c, c.gate_bk),
        down(random_dense(c.rank_out, c.hidden, c.density, 6), c),
        up_bias(random_vector(c.hidden, 7), c.dtype),
        gate_bias(random_vector(c.hidden, 8), c.dtype),
        down_bias(random_vector(c.width, 9), c.dtype) {}

  // Kernels may ask for alignment: everything starts at a multiple of 16 bytes, y included.
  SharedMlpParams params() {
    SharedMlpParams p;
    p.dtype = c.dtype;
    p.width = c.width;
    p.x = aligned(x, c.tokens * c.width);
    p.tokens = c.tokens;
    p.x_stride = c.width;
    p.base = aligned(base, c.width * c.rank);
    p.base_out = c.shared_base ? p.base : aligned(base_out, c.width * c.rank_out);
    p.rank = c.rank;
    p.rank_out = c.rank_out;
    p.up = up.view();
    gate_view_ = gate.view();
    p.gate = c.gated ? &gate_view_ : nullptr;
    p.down = down.view();
    p.up_bias = c.bias ? up_bias.data() : nullptr;
    p.gate_bias = c.bias && c.gated ? gate_bias.data() : nullptr;
    p.down_bias = c.bias ? down_bias.data() : nullptr;
    p.activation = c.activation;
    out_ = allocate(c.tokens * c.width);
    memset(out_, 0xff, static_cast<size_t>(c.tokens * c.width * element_size(c.dtype)));
    p.y = out_;
    p.y_stride = c.width;
    return p;
  }

  double result(int64_t token, int64_t feature) const {
    const char* at = out_ + (token * c.width + feature) * element_size(c.dtype);
    if (c.dtype == DType::kFloat32) {
      return *reinterpret_cast<const float*>(at);
    }
    const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
    return c.dtype == DType::kBFloat16 ? to_accumulator(BFloat16{bits})
                                       : to_accumulator(Half{bits});
  }

  std::vector<double> expected(int64_t token) const {
    std::vector<double> z(c.rank), w(c.rank_out), out(c.width);
    const Elements& last = c.shared_base ? base : base_out;
    for (int64_t r = 0; r < c.rank; ++r) {
      for (int64_t i = 0; i < c.width; ++i) {
        z[r] += x[token * c.width + i] * base[i * c.rank + r];
      }
    }
    for (int64_t n = 0; n < c.hidden; ++n) {
      double u = c.bias ? up_bias[n] : 0, g = c.bias ? gate_bias[n] : 0;
      for (int64_t r = 0; r < c.rank; ++r) {
        u += z[r] * up.exact[r * c.hidden + n];
        g += z[r] * gate.exact[r * c.hidden + n];
      }
      const double h =
          c.gated ? exact_activation(c.activation, g) * u : exact_activation(c.activation, u);
      for (int64_t r = 0; r < c.rank_out; ++r) {
        w[r] += h * down.exact[r * c.hidden + n];
      }
    }
    for (int64_t i = 0; i < c.width; ++i) {
      out[i] = c.bias ? down_bias[i] : 0;
      for (int64_t r = 0; r < c.rank_out; ++r) {
        out[i] += w[r] * last[i * c.rank_out + r];
      }
    }
    return out;
  }

  // ||result - expected|| / ||expected||
  double relative_error() const {
    double difference = 0, norm = 0;
    for (int64_t token = 0; token < c.tokens; ++token) {
      const std::vector<double> want = expected(token);
      for (int64_t i = 0; i < c.width; ++i) {
        const double d = result(token, i) - want[i];
        difference += d * d;
        norm += want[i] * want[i];
      }
    }
    return std::sqrt(difference / (norm + 1e-30));
  }

  MlpCase c;
  Elements x, base, base_out;
  TypedSlice up, gate, down;
  Elements up_bias, gate_bias, down_bias;

 private:
  static std::vector<float> scaled(int64_t count, uint32_t seed, int64_t terms) {
    std::vector<float> values = random_vector(count, seed);
    for (float& value : values) {
      value /= std::sqrt(static_cast<float>(terms));
    }
    return values;
  }

  char* allocate(int64_t count) {
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(count * element_size(c.dtype));
    EXPECT_EQ(posix_memalign(&memory, 16, bytes == 0 ? 16 : bytes), 0);
    owned_.emplace_back(static_cast<char*>(memory), &free);
    return static_cast<char*>(memory);
  }

  const void* aligned(const Elements& elements, int64_t count) {
    char* copy = allocate(count);
    memcpy(copy, elements.data(), static_cast<size_t>(count * element_size(c.dtype)));
    return copy;
  }

  std::vector<std::unique_ptr<char, void (*)(void*)>> owned_;
  BlockSparseView gate_view_;
  char* out_ = nullptr;
};

}  // namespace fips::testing
