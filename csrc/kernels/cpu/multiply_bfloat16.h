// A few rows of x times a run of weight tiles for bfloat16, by dot-product instructions with
// float32 sums. Included only from per-ISA units; the interface is that of VectorRows.
#pragma once

#include "kernels/cpu/multiply_vector.h"

namespace fips::cpu {
namespace {

#if defined(__AVX512BF16__)
FIPS_INLINE __m512bh as_pairs(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// vdpbf16ps: each lane adds the product of two pairs. The panel is [inputs / 2][kRows][2].
class PairRows {
 public:
  using Input = BFloat16;
  using Weight = BFloat16;
  using Sum = float;
  static constexpr int64_t kRows = 12, kVectors = 2;  // 24 accumulators of 32 registers

  explicit PairRows(int64_t /*in_edge*/) {}

  void pack(const BFloat16* x, int64_t stride, int64_t rows, int64_t features, int64_t padded,
            Input* panel) const {
    int64_t f = 0;
    for (; rows == kRows && f + 32 <= features; f += 32) {
      transpose_rows<kRows / 4>(x + f, stride * 2, panel + f * kRows, kRows * 4);
    }
    alignas(64) BFloat16 square[16 * 32] = {}, flipped[16 * 32];
    for (; f < padded; f += 32) {
      const int64_t count = max_of(0, min_of(32, features - f));
      for (int64_t r = 0; r < rows; ++r) {
        memset(square + r * 32, 0, 32 * sizeof(BFloat16));
        memcpy(square + r * 32, x + r * stride + f, static_cast<size_t>(count) * sizeof(BFloat16));
      }
      transpose_words(square, 16, 16, flipped);
      for (int64_t i = 0; i < min_of(32, padded - f); i += 2) {
        memcpy(panel + (f + i) * kRows, flipped + i * 16, 2 * kRows * sizeof(BFloat16));
      }
    }
  }

  template <bool kTranspose>
  static const Weight* tile(const BlockSparseView& v, int64_t b, BFloat16* scratch, Weight* out) {
    return make_pair_tile<kTranspose>(v, b, scratch, out);
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
    for (; column + kVectors * 16 <= outputs; column += kVectors * 16) {
      multiply_columns<kUsed, kVectors>(x, padded, pieces, count, column, outputs, accumulate,
                                        sums);
    }
    for (; column < outputs; column += 16) {
      multiply_columns<kUsed, 1>(x, padded, pieces, count, column, outputs, accumulate, sums);
    }
  }

  template <int64_t kUsed, int64_t kWidth>
  FIPS_INLINE void multiply_columns(const Input* x, int64_t padded, const Piece<Weight>* pieces,
                                    int64_t count, int64_t column, int64_t outputs, bool accumulate,
                                    Sum* sums) {
    __m512 acc[kUsed][kWidth];
    for (int64_t r = 0; r < kUsed; ++r) {
      for (int64_t u = 0; u < kWidth; ++u) {
        acc[r][u] = accumulate ? _mm512_loadu_ps(sums + r * outputs + column + u * 16)
                               : _mm512_setzero_ps();
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Weight* weights = pieces[i].weights + 2 * column;
      const Input* in = x + pieces[i].input * kRows;
      const Input* next =
          x + (i + 1 < count ? pieces[i + 1].input : padded + pieces[0].input) * kRows;
      for (int64_t e = 0; e < pieces[i].depth;
           e += 2, weights += 2 * outputs, in += 2 * kRows, next += 2 * kRows) {
        __builtin_prefetch(next);
        __m512bh weight[kWidth];
        for (int64_t u = 0; u < kWidth; ++u) {
          weight[u] = as_pairs(_mm512_loadu_si512(weights + u * 32));
        }
        for (int64_t r = 0; r < kUsed; ++r) {
          int32_t pair;
          memcpy(&pair, in + 2 * r, sizeof pair);
          const __m512bh value = as_pairs(_mm512_set1_epi32(pair));
          for (int64_t u = 0; u < kWidth; ++u) {
            acc[r][u] = _mm512_dpbf16_ps(acc[r][u], value, weight[u]);
          }
        }
      }
    }
    for (int64_t r = 0; r < kUsed; ++r) {
      for (int64_t u = 0; u < kWidth; ++u) {
        _mm512_storeu_ps(sums + r * outputs + column + u * 16, acc[r][u]);
      }
    }
  }
};
#endif

#if defined(__AMX_BF16__)
// _tile_loadd, after every store that comes before it: its definition names no memory, so compilers
// may move or drop what fills a tile's source. The tile number is an immediate operand.
#define FIPS_LOAD_TILE(tile, from, stride) \
  do {                                     \
    asm volatile("" ::: "memory");         \
    _tile_loadd(tile, from, stride);       \
  } while (false)

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// tdpbf16ps on tiles of 16 x 32 and 32 x 16, two by two; 16 inputs at a time for blocks that
// narrow. The panel is [inputs / step][kRows][step]. Tile registers: 0-3 sums, 4-5 rows of x, 6-7
// weights. An object owns the tile configuration of its thread.
class AmxRows {
 public:
  using Input = BFloat16;
  using Weight = BFloat16;
  using Sum = float;
  static constexpr int64_t kRows = 32;

  explicit AmxRows(int64_t in_edge) : step_(min_of(in_edge, 32)) {}
  ~AmxRows() {
    if (configured_) {
      _tile_release();
    }
  }
  AmxRows(const AmxRows&) = delete;
  AmxRows& operator=(const AmxRows&) = delete;

  void pack(const BFloat16* x, int64_t stride, int64_t rows, int64_t features, int64_t padded,
            Input* panel) const {
    for (int64_t f = 0; f < padded; f += step_, panel += kRows * step_) {
      const int64_t count = max_of(0, min_of(step_, features - f));
      if (rows < kRows || count < step_) {
        memset(panel, 0, static_cast<size_t>(kRows * step_) * sizeof(Input));
      }
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(panel + r * step_, x + r * stride + f, static_cast<size_t>(count) * sizeof(Input));
      }
    }
  }

  template <bool kTranspose>
  static const Weight* tile(const BlockSparseView& v, int64_t b, BFloat16* scratch, Weight* out) {
    return make_pair_tile<kTranspose>(v, b, scratch, out);
  }

  void multiply(const Input* x, int64_t padded, const Piece<Weight>* pieces, int64_t count,
                int64_t outputs, int64_t /*rows*/, bool accumulate, Sum* sums) {
    configure();
    for (int64_t column = 0; column < outputs; column += 32) {
      column + 16 < outputs ? multiply_columns<true>(x, padded, pieces, count, column, outputs,
                                                     accumulate, sums, step_)
                            : multiply_columns<false>(x, padded, pieces, count, column, outputs,
                                                      accumulate, sums, step_);
    }
  }

 private:
  void configure() {
    if (configured_) {
      return;
    }
    configured_ = true;
    TileConfiguration c;
    for (int64_t tile = 0; tile < 8; ++tile) {
      c.row_bytes[tile] = 64;
      c.rows[tile] = 16;
    }
    c.row_bytes[4] = c.row_bytes[5] = static_cast<uint16_t>(2 * step_);
    c.rows[6] = c.rows[7] = static_cast<uint8_t>(step_ / 2);
    _tile_loadconfig(&c);
  }

  template <bool kTwoColumns>
  FIPS_INLINE void multiply_columns(const Input* x, int64_t padded, const Piece<Weight>* pieces,
                                    int64_t count, int64_t column, int64_t outputs, bool accumulate,
                                    Sum* sums, int64_t step) {
    Sum* first = sums + column;
    Sum* second = first + 16 * outputs;
    const int64_t sum_bytes = outputs * 4, x_bytes = step * 2, weight_bytes = outputs * 4;
    if (accumulate) {
      FIPS_LOAD_TILE(0, first, sum_bytes);
      FIPS_LOAD_TILE(2, second, sum_bytes);
      if constexpr (kTwoColumns) {
        FIPS_LOAD_TILE(1, first + 16, sum_bytes);
        FIPS_LOAD_TILE(3, second + 16, sum_bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(2);
      if constexpr (kTwoColumns) {
        _tile_zero(1);
        _tile_zero(3);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Weight* weights = pieces[i].weights + 2 * column;
      const Input* in = x + pieces[i].input * kRows;
      const Input* next =
          x + (i + 1 < count ? pieces[i + 1].input : padded + pieces[0].input) * kRows;
      for (int64_t e = 0; e < pieces[i].depth;
           e += step, in += kRows * step, next += kRows * step, weights += step * outputs) {
        if (column == 0) {
          for (int64_t line = 0; line < step; ++line) {
            __builtin_prefetch(next + line * 32);
          }
        }
        FIPS_LOAD_TILE(6, weights, weight_bytes);
        FIPS_LOAD_TILE(4, in, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        FIPS_LOAD_TILE(5, in + 16 * step, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTwoColumns) {
          FIPS_LOAD_TILE(7, weights + 32, weight_bytes);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, first, sum_bytes);
    _tile_stored(2, second, sum_bytes);
    if constexpr (kTwoColumns) {
      _tile_stored(1, first + 16, sum_bytes);
      _tile_stored(3, second + 16, sum_bytes);
    }
  }

  int64_t step_;
  bool configured_ = false;
};
#endif

}  // namespace
}  // namespace fips::cpu
