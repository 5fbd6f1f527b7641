// The streaming products of stream_blocks.h through tile registers (AMX). Included only from
// per-ISA units.
#pragma once

#include "kernels/cpu/multiply_bfloat16.h"
#include "kernels/cpu/stream_blocks.h"

namespace fips::cpu {
namespace {

#if defined(__AMX_BF16__)
// Streams bfloat16 blocks with edges of 32 and 64 through tile registers, for 2 to 16 tokens: an
// instruction takes a kilobyte of weights, whatever the number of tokens. Tile registers: 0-3 sums,
// 4 left and 5 right operand.
class StreamTiles {
  using L = SlotLanes<BFloat16, true>;

 public:
  // Forward, the weights are the left operand, 16 outputs of 32 inputs, and x the right one:
  // [inputs / 2][tokens][2]. Transposed, the weights are the right one, their rows interleaved in
  // pairs, and x the left one: [tokens][inputs].
  StreamTiles(bool transpose, int64_t tokens) : transpose_(transpose), tokens_(tokens) {
    const uint16_t narrow = static_cast<uint16_t>(4 * tokens);
    const uint8_t few = static_cast<uint8_t>(tokens);
    TileConfiguration c;
    for (int64_t tile = 0; tile < 5; ++tile) {
      c.rows[tile] = transpose ? few : 16;
      c.row_bytes[tile] = transpose || tile == 4 ? 64 : narrow;
    }
    c.rows[5] = 16;
    c.row_bytes[5] = transpose ? 64 : narrow;
    _tile_loadconfig(&c);
  }
  ~StreamTiles() { _tile_release(); }
  StreamTiles(const StreamTiles&) = delete;
  StreamTiles& operator=(const StreamTiles&) = delete;

  void begin_edge() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // `x` at the first input of the block; `stride` between tokens (transposed).
  void add(const BlockSparseView& v, int64_t b, const BFloat16* x, int64_t stride) {
    transpose_ ? add_transposed(v, b, x, stride) : add_forward(v, b, x);
  }

  // Rows of a dense matrix as 16 * tiles outputs of `inputs` inputs (a multiple of 32); forward.
  void add_rows(const BFloat16* weights, int64_t stride, int64_t inputs, int64_t tiles,
                const BFloat16* x) {
    // Every row is a stream of its own, more than the processor follows.
    constexpr int64_t kAhead = 4 * 32;
    for (int64_t k = 0; k < inputs; k += 32, weights += 32) {
      for (int64_t row = 0; row < 16 * tiles; ++row) {
        __builtin_prefetch(weights + row * stride + kAhead);
      }
      FIPS_LOAD_TILE(5, x + k * tokens_, 4 * tokens_);
      FIPS_LOAD_TILE(4, weights, 2 * stride);
      _tile_dpbf16ps(0, 4, 5);
      if (tiles > 1) {
        FIPS_LOAD_TILE(4, weights + 16 * stride, 2 * stride);
        _tile_dpbf16ps(1, 4, 5);
      }
      if (tiles > 2) {
        FIPS_LOAD_TILE(4, weights + 32 * stride, 2 * stride);
        _tile_dpbf16ps(2, 4, 5);
      }
      if (tiles > 3) {
        FIPS_LOAD_TILE(4, weights + 48 * stride, 2 * stride);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  // Columns of a dense matrix as 32 * vectors outputs (at most 64) of `inputs` inputs (a multiple
  // of 32); transposed.
  void add_columns(const BFloat16* weights, int64_t stride, int64_t inputs, int64_t vectors,
                   const BFloat16* x, int64_t x_stride) {
    constexpr int64_t kAhead = 32;  // rows
    for (int64_t j = 0; j < inputs; j += 32) {
      BFloat16* out = scratch_;
      for (int64_t row = j; row < j + 32; row += 2) {
        const BFloat16* from = weights + row * stride;
        for (int64_t u = 0; u < vectors; ++u, out += 64) {
          __builtin_prefetch(from + kAhead * stride + 32 * u);
          __builtin_prefetch(from + (kAhead + 1) * stride + 32 * u);
          const __m512i first = _mm512_loadu_si512(from + 32 * u);
          const __m512i second = _mm512_loadu_si512(from + stride + 32 * u);
          _mm512_store_si512(out, _mm512_unpacklo_epi16(first, second));
          _mm512_store_si512(out + 32, _mm512_unpackhi_epi16(first, second));
        }
      }
      const int64_t row_bytes = 128 * vectors;
      FIPS_LOAD_TILE(4, x + j, 2 * x_stride);
      FIPS_LOAD_TILE(5, scratch_, row_bytes);
      _tile_dpbf16ps(0, 4, 5);
      FIPS_LOAD_TILE(5, scratch_ + 32, row_bytes);
      _tile_dpbf16ps(1, 4, 5);
      if (vectors == 2) {
        FIPS_LOAD_TILE(5, scratch_ + 64, row_bytes);
        _tile_dpbf16ps(2, 4, 5);
        FIPS_LOAD_TILE(5, scratch_ + 96, row_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  void end_edge(int64_t outputs, StreamSums<float>& sums) {
    alignas(64) float tiles[4][16][16];
    _tile_stored(0, tiles[0], 64);
    _tile_stored(1, tiles[1], 64);
    _tile_stored(2, tiles[2], 64);
    _tile_stored(3, tiles[3], 64);
    for (int64_t i = 0; i < outputs / 16; ++i) {
      alignas(64) float flipped[16][16];
      if (!transpose_) {
        transpose_rows<4>(tiles[i], 64, flipped, 64);
      }
      for (int64_t t = 0; t < tokens_; ++t) {
        memcpy(sums.total[t] + 16 * i, transpose_ ? tiles[i][t] : flipped[t], 64);
      }
    }
    for (int64_t t = 0; transpose_ && t < tokens_; ++t) {
      L::finish_outputs(sums.total[t], outputs);
    }
  }

  // x [tokens][stride] as the right operand.
  static void pack(const BFloat16* x, int64_t stride, int64_t tokens, int64_t features,
                   int64_t padded, BFloat16* out) {
    alignas(64) BFloat16 square[16][32] = {}, flipped[16][32];
    for (int64_t f = 0; f < padded; f += 32) {
      const int64_t count = max_of(0, min_of(32, features - f));
      for (int64_t t = 0; t < tokens; ++t) {
        memset(square[t], 0, sizeof square[t]);
        memcpy(square[t], x + t * stride + f, static_cast<size_t>(count) * sizeof(BFloat16));
      }
      transpose_rows<4>(square, 64, flipped, 64);
      for (int64_t i = 0; i < 16; ++i) {
        memcpy(out + (f + 2 * i) * tokens, flipped[i], static_cast<size_t>(4 * tokens));
      }
    }
  }

 private:
  void add_forward(const BlockSparseView& v, int64_t b, const BFloat16* x) {
    const BFloat16* weights = block_elements(v, b, scratch_);
    const int64_t row_bytes = 2 * v.bk;
    for (int64_t k = 0; k < v.bk; k += 32, weights += 32) {
      FIPS_LOAD_TILE(5, x + k * tokens_, 4 * tokens_);
      FIPS_LOAD_TILE(4, weights, row_bytes);
      _tile_dpbf16ps(0, 4, 5);
      FIPS_LOAD_TILE(4, weights + 16 * v.bk, row_bytes);
      _tile_dpbf16ps(1, 4, 5);
      if (v.bn == 64) {
        FIPS_LOAD_TILE(4, weights + 32 * v.bk, row_bytes);
        _tile_dpbf16ps(2, 4, 5);
        FIPS_LOAD_TILE(4, weights + 48 * v.bk, row_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  void add_transposed(const BlockSparseView& v, int64_t b, const BFloat16* x, int64_t stride) {
    v.bk == 64 ? interleave<2>(v, b) : interleave<1>(v, b);
    const BFloat16* weights = scratch_;
    const int64_t row_bytes = 4 * v.bk;
    for (int64_t j = 0; j < v.bn; j += 32, weights += 32 * v.bk) {
      FIPS_LOAD_TILE(4, x + j, 2 * stride);
      FIPS_LOAD_TILE(5, weights, row_bytes);
      _tile_dpbf16ps(0, 4, 5);
      FIPS_LOAD_TILE(5, weights + 32, row_bytes);
      _tile_dpbf16ps(1, 4, 5);
      if (v.bk == 64) {
        FIPS_LOAD_TILE(5, weights + 64, row_bytes);
        _tile_dpbf16ps(2, 4, 5);
        FIPS_LOAD_TILE(5, weights + 96, row_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
  }

  // The block as [bn / 2][bk][2] in scratch_.
  template <int64_t kVectors>
  void interleave(const BlockSparseView& v, int64_t b) {
    read_slots<L>(v, b, scratch_, [&](auto next) __attribute__((always_inline)) {
      BFloat16* out = scratch_;
      for (int64_t j = 0; j < v.bn; j += 2) {
        __m512i rows[kVectors][2];
        for (int64_t i = 0; i < 2; ++i) {
          for (int64_t u = 0; u < kVectors; ++u) {
            rows[u][i] = next();
          }
        }
        for (int64_t u = 0; u < kVectors; ++u, out += 64) {
          L::interleave(rows[u]);
          _mm512_store_si512(out, rows[u][0]);
          _mm512_store_si512(out + 32, rows[u][1]);
        }
      }
    });
  }

  bool transpose_;
  int64_t tokens_;
  alignas(64) BFloat16 scratch_[64 * 64];
};
#endif

}  // namespace
}  // namespace fips::cpu
