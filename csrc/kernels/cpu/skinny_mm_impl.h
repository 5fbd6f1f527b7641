// skinny_mm for one instruction set. x is converted to the accumulator type once; the matrix is
// converted as it is read, or goes through tile registers as it is.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/stream_tiles.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// One sum, with its bias and addend, to its output.
template <class T>
FIPS_INLINE void write_skinny(const SkinnyMmParams& p, Accumulator<T> sum, int64_t token,
                              int64_t output) {
  if (p.bias != nullptr) {
    sum += to_accumulator(static_cast<const T*>(p.bias)[output]);
  }
  if (p.addend != nullptr) {
    sum += to_accumulator(static_cast<const T*>(p.addend)[token * p.addend_stride + output]);
  }
  static_cast<T*>(p.out)[token * p.out_stride + output] = FromAccumulator<T>::convert(sum);
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
      const Vector<A> weights = ConvertedLanes<T>::load(matrix + r * p.cols + c);
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
      write_skinny<T>(p, sum, token + t, row + r);
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
      const Vector<A> weights = ConvertedLanes<T>::load(matrix + u * kLanes<A>);
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

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
// Whether bfloat16 stays as it is: several tokens, edges that fill the registers.
bool skinny_in_pairs(const SkinnyMmParams& p) {
  return p.dtype == DType::kBFloat16 && p.tokens > 1 && p.cols % 32 == 0 && p.rows % 16 == 0;
}

// `kTokens` tokens from `first` on, outputs [begin, end): multiples of 16 rows or 32 columns.
template <int64_t kTokens>
void skinny_pairs(const SkinnyMmParams& p, int64_t first, int64_t begin, int64_t end) {
  using L = SlotLanes<BFloat16, true>;
  const auto* matrix = static_cast<const BFloat16*>(p.matrix);
  const BFloat16* x = static_cast<const BFloat16*>(p.x) + first * p.x_stride;
  if (p.transpose) {
    constexpr int64_t kRows = TokenDots<L, kTokens>::kRows;
    for (int64_t row = begin; row < end; row += kRows) {
      TokenDots<L, kTokens> dots;
      dots.add(matrix + row * p.cols, p.cols, x, p.x_stride, p.cols);
      dots.finish([&](int64_t r, int64_t t, float sum) __attribute__((always_inline)) {
        write_skinny<BFloat16>(p, sum, first + t, row + r);
      });
    }
    return;
  }
  constexpr int64_t kColumns = 64;
  for (int64_t column = begin; column < end; column += kColumns) {
    const int64_t count = min_of(kColumns, end - column);
    alignas(64) float sums[kTokens][kColumns] = {};
    TokenScales<L, kTokens>::add(matrix + column, p.cols, p.rows, x, p.x_stride, count, sums[0],
                                 kColumns);
    for (int64_t t = 0; t < kTokens; ++t) {
      L::finish_outputs(sums[t], count);
      for (int64_t i = 0; i < count; ++i) {
        write_skinny<BFloat16>(p, sums[t][i], first + t, column + i);
      }
    }
  }
}
#endif

#if defined(__AMX_BF16__)
// Whether the tile registers do the product: 2 to 16 tokens of bfloat16, edges that fill the tiles.
bool skinny_in_tiles(const SkinnyMmParams& p) {
  return p.dtype == DType::kBFloat16 && p.tokens > 1 && p.tokens <= kFewTokens &&
         p.cols % 32 == 0 && p.rows % (p.transpose ? 16 : 32) == 0;
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
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t i = 0; i < count; ++i) {
        write_skinny<BFloat16>(p, sums.total[t][i], t, first + i);
      }
    }
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
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  if (skinny_in_pairs(p)) {
    return;
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
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  if (skinny_in_pairs(p)) {
    const int64_t chunk = ceil_div(p.tokens, ceil_div(p.tokens, kMostTokens));
    for (int64_t t = 0; t < p.tokens; t += chunk) {
      with_tokens(min_of(chunk, p.tokens - t),
                  [&](auto tokens) { skinny_pairs<tokens>(p, t, begin, end); });
    }
    return;
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
