// Stored blocks as the right operand of a product: [inputs][outputs] tiles, outputs contiguous.
// Included only from per-ISA units.
//
// A tile is made once per group of tokens, so its cost is shared by hundreds of rows of x; that is
// what lets one copy of the values, k contiguous, serve both directions. Instructions that multiply
// pairs of bfloat16 take [inputs / 2][outputs][2] instead.
#pragma once

#include "kernels/cpu/block_tile.h"

namespace fips::cpu {
namespace {

// The rows [input, input + depth) of x that a tile multiplies.
template <class W>
struct Piece {
  const W* weights;
  int64_t input;
  int64_t depth;
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// The first kQuads (3 or 4) quarters of a register. Some processors store under a mask several
// times as slowly.
template <int64_t kQuads>
FIPS_INLINE void store_quads(char* out, __m512i v) {
  if constexpr (kQuads == 4) {
    _mm512_storeu_si512(out, v);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32), _mm512_extracti32x4_epi32(v, 2));
  }
}

// out[c][r] = in[r][c] for kQuads * 4 rows of kWords numbers of 32 bits. Rows are gathered four to
// a register by loads, which leaves two rounds of shuffles inside 128-bit lanes.
template <int64_t kQuads, int64_t kWords = 16>
FIPS_INLINE void transpose_rows(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for (int64_t chunk = 0; chunk < kWords / 4; ++chunk) {
    __m512i rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      const char* row = from + i * in_stride + chunk * 16;
      auto lane = [&](int64_t k) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * k * in_stride));
      };
      rows[i] = _mm512_castsi128_si512(lane(0));
      rows[i] = _mm512_inserti32x4(rows[i], lane(1), 1);
      rows[i] = _mm512_inserti32x4(rows[i], lane(2), 2);
      if constexpr (kQuads == 4) {
        rows[i] = _mm512_inserti32x4(rows[i], lane(3), 3);
      }
    }
    const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    char* line = to + 4 * chunk * out_stride;
    store_quads<kQuads>(line, _mm512_unpacklo_epi64(low01, low23));
    store_quads<kQuads>(line + out_stride, _mm512_unpackhi_epi64(low01, low23));
    store_quads<kQuads>(line + 2 * out_stride, _mm512_unpacklo_epi64(high01, high23));
    store_quads<kQuads>(line + 3 * out_stride, _mm512_unpackhi_epi64(high01, high23));
  }
}

// out [cols][rows] = in [rows][cols], both in numbers of 32 bits; rows a multiple of 16, cols of 8.
FIPS_INLINE void transpose_words(const void* in, int64_t rows, int64_t cols, void* out) {
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for (int64_t r = 0; r < rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) {
      transpose_rows<4>(from + (r * cols + c) * 4, cols * 4, to + (c * rows + r) * 4, rows * 4);
    }
    if (c < cols) {
      transpose_rows<4, 8>(from + (r * cols + c) * 4, cols * 4, to + (c * rows + r) * 4, rows * 4);
    }
  }
}
#endif

// `in` is [rows][cols] of T; `out` is [cols][rows] of its accumulator.
template <class T>
FIPS_INLINE void transpose_elements(const T* in, int64_t rows, int64_t cols, Accumulator<T>* out) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (__is_same(T, float)) {
    return transpose_words(in, rows, cols, out);
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      out[c * rows + r] = to_accumulator(in[r * cols + c]);
    }
  }
}

// The tile of stored block `b`, in `out` unless the values already are one.
template <class T, bool kTranspose>
FIPS_INLINE const Accumulator<T>* make_tile(const BlockSparseView& v, int64_t b, T* scratch,
                                            Accumulator<T>* out) {
  const T* block = block_elements(v, b, scratch);  // [bn][bk]
  if constexpr (!kTranspose) {
    transpose_elements(block, v.bn, v.bk, out);
    return out;
  } else {
    if constexpr (__is_same(T, Accumulator<T>)) {
      if (!v.is_bitmap() && !v.is_quantised()) {
        // Blocks of a row lie anywhere; the tokens that follow should not wait for each in turn.
        for (int64_t i = 0; i < v.slots(); i += 64 / static_cast<int64_t>(sizeof(T))) {
          __builtin_prefetch(block + i, 0, 2);
        }
        return block;
      }
    }
    for (int64_t i = 0; i < v.slots(); ++i) {
      out[i] = to_accumulator(block[i]);
    }
    return out;
  }
}

#if defined(__AVX512BF16__)
template <bool kTranspose>
FIPS_INLINE const BFloat16* make_pair_tile(const BlockSparseView& v, int64_t b, BFloat16* scratch,
                                           BFloat16* out) {
  const BFloat16* block = block_elements(v, b, scratch);
  if constexpr (!kTranspose) {
    transpose_words(block, v.bn, v.bk / 2, out);  // a pair along k is a word
  } else {
    for (int64_t j = 0; j < v.bn; j += 2) {
      for (int64_t k = 0; k < v.bk; k += 16) {
        auto row = [&](int64_t i) {
          return _mm512_cvtepu16_epi32(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + i * v.bk + k)));
        };
        _mm512_storeu_si512(out + j * v.bk + 2 * k,
                            _mm512_or_si512(row(j), _mm512_slli_epi32(row(j + 1), 16)));
      }
    }
  }
  return out;
}
#endif

}  // namespace
}  // namespace fips::cpu
