// skinny_mm for one instruction set. x is converted to the accumulator type once; the matrix is
// converted as it is read, or goes through tile registers as it is.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/stream_tiles.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// One vector of numbers, converted.
template <class T>
FIPS_INLINE Vector<Accumulator<T>> load_converted(const T* p) {
  if constexpr (__is_same(T, Accumulator<T>)) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(T, BFloat16)) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    } else {
      return _mm512_cvtph_ps(half);
    }
#else
    Vector<float> v;
    for (int64_t i = 0; i < kLanes<float>; ++i) {
      v[i] = to_accumulator(p[i]);
    }
    return v;
#endif
  }
}

// out[t][row] = sum over columns of x[t][column] * matrix[row][column].
template <class T, int64_t kRows, int64_t kTokens>
FIPS_INLINE void dot_rows(const SkinnyMmParams& p, const Accumulator<T>* x, int64_t row,
                          int64_t token) {
  using A = Accumulator<T>;
  const T* matrix = static_cast<const T*>(p.matrix) + row * p.cols;
  Vector<A> acc[kRows][kTokens] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= p.cols; c += kLanes<A>) {
    Vector<A> in[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      in[t] = load(x + (token + t) * p.cols + c);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const Vector<A> weights = load_converted(matrix + r * p.cols + c);
      for (int64_t t = 0; t < kTokens; ++t) {
        acc[r][t] += weights * in[t];
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t t = 0; t < kTokens; ++t) {
      A sum = sum_lanes<A>(acc[r][t]);
      for (int64_t rest = c; rest < p.cols; ++rest) {
        sum += to_accumulator(matrix[r * p.cols + rest]) * x[(token + t) * p.cols + rest];
      }
      if (p.bias != nullptr) {
        sum += to_accumulator(static_cast<const T*>(p.bias)[row + r]);
      }
      if (p.addend != nullptr) {
        sum += to_accumulator(
            static_cast<const T*>(p.addend)[(token + t) * p.addend_stride + row + r]);
      }
      static_cast<T*>(p.out)[(token + t) * p.out_stride + row + r] =
          FromAccumulator<T>::convert(sum);
    }
  }
}

// out[t][column] = sum over rows of x[t][row] * matrix[row][column], for whole vectors of columns.
template <class T, int64_t kVectors, int64_t kTokens>
FIPS_INLINE void scale_rows(const SkinnyMmParams& p, const Accumulator<T>* x, int64_t column,
                            int64_t token) {
  using A = Accumulator<T>;
  constexpr int64_t kAhead =
      8;  // rows: the next ones are a stride away, which no prefetcher follows
  const T* matrix = static_cast<const T*>(p.matrix) + column;
  Vector<A> acc[kTokens][kVectors] = {};
  for (int64_t row = 0; row < p.rows; ++row, matrix += p.cols) {
    for (int64_t u = 0; u < kVectors; ++u) {
      if (u * kLanes<A> * sizeof(T) % 64 == 0) {
        __builtin_prefetch(matrix + kAhead * p.cols + u * kLanes<A>);
      }
      const Vector<A> weights = load_converted(matrix + u * kLanes<A>);
      for (int64_t t = 0; t < kTokens; ++t) {
        acc[t][u] += x[(token + t) * p.rows + row] * weights;
      }
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    A sums[kVectors * kLanes<A>];
    memcpy(sums, acc[t], sizeof sums);
    T* out = static_cast<T*>(p.out) + (token + t) * p.out_stride + column;
    for (int64_t i = 0; i < kVectors * kLanes<A>; ++i) {
      out[i] = FromAccumulator<T>::convert(sums[i]);
    }
  }
}

// Calls body(first token, constant number of tokens) until all are done.
template <int64_t kMost, class F>
FIPS_INLINE void for_tokens(int64_t tokens, F&& body) {
  int64_t t = 0;
  for (; t + kMost <= tokens; t += kMost) {
    body(t, std::integral_constant<int64_t, kMost>{});
  }
  if constexpr (kMost > 1) {
    if (t + kMost / 2 <= tokens) {
      body(t, std::integral_constant<int64_t, kMost / 2>{});
      t += kMost / 2;
    }
  }
  for (; t < tokens; ++t) {
    body(t, std::integral_constant<int64_t, 1>{});
  }
}

template <class T>
void skinny_rows(const SkinnyMmParams& p, const Accumulator<T>* x, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    for_tokens<4>(p.tokens, [&](int64_t t, auto count) { dot_rows<T, 4, count>(p, x, row, t); });
  }
  for (; row < end; ++row) {
    for_tokens<4>(p.tokens, [&](int64_t t, auto count) { dot_rows<T, 1, count>(p, x, row, t); });
  }
}

template <class T>
void skinny_columns(const SkinnyMmParams& p, const Accumulator<T>* x, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  int64_t column = begin;
  auto cover = [&](auto vectors) {
    constexpr int64_t kVectors = decltype(vectors)::value;
    // As many sums as registers: many columns of one token, or a few of several.
    constexpr int64_t kMost = kVectors >= 8 ? 1 : 4;
    for (; column + kVectors * kLanes<A> <= end; column += kVectors * kLanes<A>) {
      for_tokens<kMost>(p.tokens, [&](int64_t t, auto count) {
        scale_rows<T, kVectors, count>(p, x, column, t);
      });
    }
  };
#if defined(__AVX512F__)
  if (p.tokens == 1) {
    cover(std::integral_constant<int64_t, 16>{});
  }
  cover(std::integral_constant<int64_t, 4>{});
#else
  cover(std::integral_constant<int64_t, 2>{});
#endif
  cover(std::integral_constant<int64_t, 1>{});
  for (; column < end; ++column) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      A sum = 0;
      for (int64_t row = 0; row < p.rows; ++row) {
        sum += x[t * p.rows + row] *
               to_accumulator(static_cast<const T*>(p.matrix)[row * p.cols + column]);
      }
      static_cast<T*>(p.out)[t * p.out_stride + column] = FromAccumulator<T>::convert(sum);
    }
  }
}

#if defined(__AMX_BF16__)
// Whether the tile registers do the product: 2 to 16 tokens of bfloat16, edges that fill the tiles.
bool skinny_in_tiles(const SkinnyMmParams& p) {
  return p.dtype == DType::kBFloat16 && p.tokens > 1 && p.tokens <= kStreamTokens &&
         p.cols % 32 == 0 && p.rows % (p.transpose ? 16 : 32) == 0;
}

void write_skinny(const SkinnyMmParams& p, const StreamSums<float>& sums, int64_t first,
                  int64_t count) {
  const auto* bias = static_cast<const BFloat16*>(p.bias);
  const auto* addend = static_cast<const BFloat16*>(p.addend);
  for (int64_t t = 0; t < p.tokens; ++t) {
    BFloat16* out = static_cast<BFloat16*>(p.out) + t * p.out_stride + first;
    for (int64_t i = 0; i < count; ++i) {
      float sum = sums.total[t][i];
      if (bias != nullptr) {
        sum += to_accumulator(bias[first + i]);
      }
      if (addend != nullptr) {
        sum += to_accumulator(addend[t * p.addend_stride + first + i]);
      }
      out[i] = FromAccumulator<BFloat16>::convert(sum);
    }
  }
}

void skinny_tiles(const SkinnyMmParams& p, const BFloat16* packed, int64_t begin, int64_t end) {
  const auto* matrix = static_cast<const BFloat16*>(p.matrix);
  StreamTiles tiles(!p.transpose, p.tokens);
  StreamSums<float> sums;
  for (int64_t first = begin; first < end; first += 64) {
    const int64_t count = min_of(64, end - first);
    tiles.begin_edge();
    if (p.transpose) {
      tiles.add_rows(matrix + first * p.cols, p.cols, p.cols, count / 16, packed);
    } else {
      tiles.add_columns(matrix + first, p.cols, p.rows, count / 32,
                        static_cast<const BFloat16*>(p.x), p.x_stride);
    }
    tiles.end_edge(count, sums);
    write_skinny(p, sums, first, count);
  }
}
#endif

void skinny_pack(const SkinnyMmParams& p, void* packed) {
#if defined(__AMX_BF16__)
  if (skinny_in_tiles(p)) {
    if (p.transpose) {
      StreamTiles::pack(static_cast<const BFloat16*>(p.x), p.x_stride, p.tokens, p.cols, p.cols,
                        static_cast<BFloat16*>(packed));
    }
    return;  // otherwise x is read in place
  }
#endif
  with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t features = p.in_features();
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* in = static_cast<const T*>(p.x) + t * p.x_stride;
      auto* out = static_cast<Accumulator<T>*>(packed) + t * features;
      for (int64_t f = 0; f < features; ++f) {
        out[f] = to_accumulator(in[f]);
      }
    }
  });
}

void skinny_mm(const SkinnyMmParams& p, const void* packed, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (skinny_in_tiles(p)) {
    return skinny_tiles(p, static_cast<const BFloat16*>(packed), begin, end);
  }
#endif
  with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* x = static_cast<const Accumulator<T>*>(packed);
    p.transpose ? skinny_rows<T>(p, x, begin, end) : skinny_columns<T>(p, x, begin, end);
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
