// A few tokens times rows of weights, all sums in registers: each weight is loaded once for all
// tokens, each x once for several rows. The weights are blocks (stream_blocks.h) or a dense matrix
// (skinny_mm_impl.h). Included only from per-ISA units.
#pragma once

#include "kernels/cpu/lanes.h"

namespace fips::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kTokenSums = 16;  // of 32 registers
#else
constexpr int64_t kTokenSums = 8;  // of 16 registers
#endif
constexpr int64_t kMostTokens = 8;

// The largest power of two that does not pass n.
constexpr int64_t floor_power(int64_t n) { return n < 2 ? 1 : 2 * floor_power(n / 2); }

// sums[r][t] = sum over k of weights[r][k] * x[t][k]: the lanes of a register go along k.
template <class L, int64_t kTokens>
class TokenDots {
  using T = typename L::Stored;
  using A = Accumulator<T>;

 public:
  static constexpr int64_t kRows = floor_power(kTokenSums / kTokens);

  // `length` is a multiple of the lanes' width.
  inline __attribute__((always_inline)) void add(const T* weights, int64_t stride,
                                                 const typename L::Element* x, int64_t x_stride,
                                                 int64_t length) {
    for (int64_t k = 0; k < length; k += L::kWidth) {
      typename L::Register weight[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        weight[r] = L::load(weights + r * stride + k);
      }
      for (int64_t t = 0; t < kTokens; ++t) {
        const typename L::Register in = L::load_x(x + t * x_stride + k);
        for (int64_t r = 0; r < kRows; ++r) {
          sums_[r][t] = L::multiply_add(sums_[r][t], weight[r], in);
        }
      }
    }
  }

  // Calls body(row, token, sum).
  template <class F>
  inline __attribute__((always_inline)) void finish(F&& body) const {
    typename L::Sum lanes[16] = {};
    for (int64_t i = 0; i < kRows * kTokens; ++i) {
      lanes[i] = sums_[i / kTokens][i % kTokens];
    }
    A folded[16];
    L::fold(lanes, folded);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t t = 0; t < kTokens; ++t) {
        body(r, t, folded[r * kTokens + t]);
      }
    }
  }

 private:
  typename L::Sum sums_[kRows][kTokens] = {};
};

// sums[t][o] += sum over rows j of x[t][j] * weights[j][o]: the lanes of a register go along o, in
// the order that L::finish_outputs mends.
template <class L, int64_t kTokens>
class TokenScales {
  using T = typename L::Stored;
  using A = Accumulator<T>;

 public:
  // `rows` is a multiple of the lanes' terms, `outputs` of their width.
  static void add(const T* weights, int64_t stride, int64_t rows, const typename L::Element* x,
                  int64_t x_stride, int64_t outputs, A* sums, int64_t sum_stride) {
    int64_t o = 0;
    auto cover = [&](auto wide) __attribute__((always_inline)) {
      for (; o + wide * L::kWidth <= outputs; o += wide * L::kWidth) {
        add_columns<wide>(weights + o, stride, rows, x, x_stride, sums + o, sum_stride);
      }
    };
    cover(std::integral_constant<int64_t, kWide>{});
    if constexpr (kWide > 2) {
      cover(std::integral_constant<int64_t, 2>{});
    }
    if constexpr (kWide > 1) {
      cover(std::integral_constant<int64_t, 1>{});
    }
  }

 private:
  // Registers of outputs at a time.
  static constexpr int64_t kWide =
      max_of(1, min_of(4, floor_power(kTokenSums / kTokens)) / L::kParts);
  static constexpr int64_t kAhead = 16;  // rows: a stride apart, which few prefetchers follow

  template <int64_t kRegisters>
  FIPS_INLINE void add_columns(const T* weights, int64_t stride, int64_t rows,
                               const typename L::Element* x, int64_t x_stride, A* sums,
                               int64_t sum_stride) {
    constexpr int64_t kSums = kRegisters * L::kParts;
    typename L::Sum acc[kTokens][kSums];
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t u = 0; u < kSums; ++u) {
        acc[t][u] = L::load_sum(sums + t * sum_stride + u * L::kSumWidth);
      }
    }
    for (int64_t j = 0; j < rows; j += L::kTerms, weights += L::kTerms * stride) {
      typename L::Register weight[kRegisters][L::kTerms];
      for (int64_t u = 0; u < kRegisters; ++u) {
        for (int64_t i = 0; i < L::kTerms; ++i) {
          __builtin_prefetch(weights + (kAhead + i) * stride + u * L::kWidth);
          weight[u][i] = L::load(weights + i * stride + u * L::kWidth);
        }
        L::interleave(weight[u]);
      }
      for (int64_t t = 0; t < kTokens; ++t) {
        const typename L::Register in = L::broadcast(x + t * x_stride + j);
        for (int64_t u = 0; u < kSums; ++u) {
          acc[t][u] = L::multiply_add(acc[t][u], weight[u / L::kParts][u % L::kParts], in);
        }
      }
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t u = 0; u < kSums; ++u) {
        L::store_sum(sums + t * sum_stride + u * L::kSumWidth, acc[t][u]);
      }
    }
  }
};

// Calls body with the number of tokens, 1 to kMostTokens, as a constant.
template <class F>
FIPS_INLINE void with_tokens(int64_t tokens, F&& body) {
  switch (tokens) {
    case 1:
      return body(std::integral_constant<int64_t, 1>{});
    case 2:
      return body(std::integral_constant<int64_t, 2>{});
    case 3:
      return body(std::integral_constant<int64_t, 3>{});
    case 4:
      return body(std::integral_constant<int64_t, 4>{});
    case 5:
      return body(std::integral_constant<int64_t, 5>{});
    case 6:
      return body(std::integral_constant<int64_t, 6>{});
    case 7:
      return body(std::integral_constant<int64_t, 7>{});
    default:
      return body(std::integral_constant<int64_t, kMostTokens>{});
  }
}

}  // namespace
}  // namespace fips::cpu
