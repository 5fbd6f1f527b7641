// A few rows of x times a run of weight tiles, in the accumulator type: the inner product of
// block_sparse_mm for every element type. Included only from per-ISA units.
#pragma once

#include "kernels/cpu/weight_tile.h"

namespace fips::cpu {
namespace {

// Interface shared with PairRows and AmxRows (multiply_bfloat16.h): kRows, the rows of x taken at
// once; the types of x in its panel, of the weight tiles and of the sums; and
//   pack      copies rows of x into a panel: [inputs][kRows] here, so that the product reads it in
//             one stream. Feature f starts at f * kRows in every form of the panel.
//   tile      makes the weight tile of a stored block
//   multiply  sums[r][o] (+)= sum over pieces of x[r][input + e] * weights[e][o], for at least the
//             first `rows` r; the panel is `padded` inputs wide and is followed by another, or by
//             anything
template <class T>
class VectorRows {
 public:
  using Input = Accumulator<T>;
  using Weight = Accumulator<T>;
  using Sum = Accumulator<T>;
  static constexpr int64_t kVectors = 2;
#if defined(__AVX512F__)
  static constexpr int64_t kRows = 12;  // 24 accumulators of 32 registers
#else
  static constexpr int64_t kRows = 6;  // 12 accumulators of 16 registers
#endif

  explicit VectorRows(int64_t /*in_edge*/) {}

  // Rows [0, rows) of x, `features` wide, zero up to kRows and `padded` (a multiple of 16).
  void pack(const T* x, int64_t stride, int64_t rows, int64_t features, int64_t padded,
            Input* panel) const {
    int64_t f = 0;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    if constexpr (__is_same(T, float)) {
      for (; rows == kRows && f + 16 <= features; f += 16) {
        transpose_rows<kRows / 4>(x + f, stride * 4, panel + f * kRows, kRows * 4);
      }
    }
#endif
    alignas(64) Input square[16 * 16] = {}, flipped[16 * 16];
    for (; f < padded; f += 16) {
      const int64_t count = max_of(0, min_of(16, features - f));
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = x + r * stride + f;
        for (int64_t i = 0; i < 16; ++i) {
          square[r * 16 + i] = i < count ? to_accumulator(row[i]) : Input(0);
        }
      }
      transpose_elements(square, 16, 16, flipped);
      for (int64_t i = 0; i < 16; ++i) {
        memcpy(panel + (f + i) * kRows, flipped + i * 16, kRows * sizeof(Input));
      }
    }
  }

  template <bool kTranspose>
  static const Weight* tile(const BlockSparseView& v, int64_t b, T* scratch, Weight* out) {
    return make_tile<T, kTranspose>(v, b, scratch, out);
  }

  void multiply(const Input* x, int64_t padded, const Piece<Weight>* pieces, int64_t count,
                int64_t outputs, int64_t rows, bool accumulate, Sum* sums) const {
    constexpr int64_t kThird = kRows / 3;
    if (rows <= kThird) {
      multiply_rows<kThird>(x, padded, pieces, count, outputs, accumulate, sums);
    } else if (rows <= 2 * kThird) {
      multiply_rows<2 * kThird>(x, padded, pieces, count, outputs, accumulate, sums);
    } else {
      multiply_rows<kRows>(x, padded, pieces, count, outputs, accumulate, sums);
    }
  }

 private:
  template <int64_t kUsed>
  static void multiply_rows(const Input* x, int64_t padded, const Piece<Weight>* pieces,
                            int64_t count, int64_t outputs, bool accumulate, Sum* sums) {
    int64_t column = 0;
    for (; column + kVectors * kLanes<Sum> <= outputs; column += kVectors * kLanes<Sum>) {
      multiply_columns<kUsed, kVectors>(x, padded, pieces, count, column, outputs, accumulate,
                                        sums);
    }
    for (; column < outputs; column += kLanes<Sum>) {
      multiply_columns<kUsed, 1>(x, padded, pieces, count, column, outputs, accumulate, sums);
    }
  }

  template <int64_t kUsed, int64_t kWidth>
  FIPS_INLINE void multiply_columns(const Input* x, int64_t padded, const Piece<Weight>* pieces,
                                    int64_t count, int64_t column, int64_t outputs, bool accumulate,
                                    Sum* sums) {
    Vector<Sum> acc[kUsed][kWidth];
    for (int64_t r = 0; r < kUsed; ++r) {
      for (int64_t u = 0; u < kWidth; ++u) {
        acc[r][u] =
            accumulate ? load(sums + r * outputs + column + u * kLanes<Sum>) : Vector<Sum>{};
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Weight* weights = pieces[i].weights + column;
      const Input* in = x + pieces[i].input * kRows;
      // Where the next piece begins no prefetcher of the processor knows: it jumps.
      const Input* next =
          x + (i + 1 < count ? pieces[i + 1].input : padded + pieces[0].input) * kRows;
      for (int64_t e = 0; e < pieces[i].depth;
           ++e, weights += outputs, in += kRows, next += kRows) {
        __builtin_prefetch(next);
        Vector<Sum> weight[kWidth];
        for (int64_t u = 0; u < kWidth; ++u) {
          weight[u] = load(weights + u * kLanes<Sum>);
        }
        for (int64_t r = 0; r < kUsed; ++r) {
          const Input value = in[r];
          for (int64_t u = 0; u < kWidth; ++u) {
            acc[r][u] += value * weight[u];
          }
        }
      }
    }
    for (int64_t r = 0; r < kUsed; ++r) {
      for (int64_t u = 0; u < kWidth; ++u) {
        store<Sum>(sums + r * outputs + column + u * kLanes<Sum>, acc[r][u]);
      }
    }
  }
};

}  // namespace
}  // namespace fips::cpu
