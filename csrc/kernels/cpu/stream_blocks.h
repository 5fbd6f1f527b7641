// The blocks of an output edge times a few tokens. Every stored byte is read once, in order, and
// used where it lands: expanded and converted in registers. k, contiguous in a block, is the vector
// dimension in both directions. Included only from per-ISA units.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/multiply_bfloat16.h"

namespace fips::cpu {
namespace {

// Sums of an output edge. `partial` holds vectors whose lanes are still to be added.
template <class A>
struct StreamSums {
  alignas(64) Vector<A> partial[kVectorTokens][kMaxEdge];
  alignas(64) A total[kStreamTokens][kMaxEdge];
};

// total[t][j] = the sum of the lanes of partial[t][j].
template <class A>
FIPS_INLINE void fold(StreamSums<A>& sums, int64_t tokens, int64_t outputs) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < outputs; j += 16) {
      const Vector<A>* in = sums.partial[t] + j;
      A* out = sums.total[t] + j;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
      if constexpr (__is_same(A, float)) {
        // Each round halves the vectors: neighbours are interleaved and added.
        __m512 v[16];
        for (int64_t i = 0; i < 8; ++i) {
          v[i] = _mm512_add_ps(_mm512_unpacklo_ps(in[2 * i], in[2 * i + 1]),
                               _mm512_unpackhi_ps(in[2 * i], in[2 * i + 1]));
        }
        for (int64_t i = 0; i < 4; ++i) {
          const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
          v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        for (int64_t i = 0; i < 2; ++i) {
          v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
        }
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                                            _mm512_shuffle_f32x4(v[0], v[1], 0xdd)));
        continue;
      }
#endif
      for (int64_t i = 0; i < 16; ++i) {
        out[i] = sum_lanes<A>(in[i]);
      }
    }
  }
}

// Streams blocks in the accumulator type.
template <class T>
class StreamVectors {
 public:
  using A = Accumulator<T>;
  using Element = A;

  void dot(const BlockSparseView& v, int64_t b, const A* x, int64_t x_stride, int64_t tokens,
           StreamSums<A>& sums) {
    const A* weights = block(v, b);
    for (int64_t j = 0; j < v.bn; ++j, weights += v.bk) {
      for (int64_t t = 0; t < tokens; ++t) {
        Vector<A> sum = sums.partial[t][j];
        for (int64_t k = 0; k < v.bk; k += kLanes<A>) {
          sum += load(weights + k) * load(x + t * x_stride + k);
        }
        sums.partial[t][j] = sum;
      }
    }
  }

  void scale(const BlockSparseView& v, int64_t b, const A* x, int64_t x_stride, int64_t tokens,
             StreamSums<A>& sums) {
    const A* weights = block(v, b);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t k = 0;
      for (; k + 4 * kLanes<A> <= v.bk; k += 4 * kLanes<A>) {
        scale_columns<4>(v, weights + k, x + t * x_stride, sums.total[t] + k);
      }
      for (; k < v.bk; k += kLanes<A>) {
        scale_columns<1>(v, weights + k, x + t * x_stride, sums.total[t] + k);
      }
    }
  }

  void finish_scale(int64_t /*tokens*/, int64_t /*outputs*/, StreamSums<A>& /*sums*/) const {}

 private:
  const A* block(const BlockSparseView& v, int64_t b) {
    const T* elements = block_elements(v, b, elements_);
    if constexpr (__is_same(T, A)) {
      return elements;
    } else {
      for (int64_t i = 0; i < v.slots(); ++i) {
        converted_[i] = to_accumulator(elements[i]);
      }
      return converted_;
    }
  }

  template <int64_t kWidth>
  FIPS_INLINE void scale_columns(const BlockSparseView& v, const A* weights, const A* x, A* sums) {
    Vector<A> acc[kWidth];
    for (int64_t u = 0; u < kWidth; ++u) {
      acc[u] = load(sums + u * kLanes<A>);
    }
    for (int64_t j = 0; j < v.bn; ++j) {
      for (int64_t u = 0; u < kWidth; ++u) {
        acc[u] += x[j] * load(weights + j * v.bk + u * kLanes<A>);
      }
    }
    for (int64_t u = 0; u < kWidth; ++u) {
      store<A>(sums + u * kLanes<A>, acc[u]);
    }
  }

  alignas(64) T elements_[kMaxEdge * kMaxEdge];
  alignas(64) A converted_[__is_same(T, A) ? 1 : kMaxEdge * kMaxEdge];
};

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
// Streams float, float16 and bfloat16 in registers of 512 bits.
template <class T>
class StreamSlots {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  // bfloat16 stays as it is, 32 to a register, multiplied in pairs (blocks at least 32 deep).
  static constexpr bool kPairs = __is_same(T, BFloat16);
#else
  static constexpr bool kPairs = false;
#endif
  static constexpr int64_t kWidth = kPairs ? 32 : 16;

 public:
  using A = float;
  using Element = std::conditional_t<kPairs, T, float>;

  void dot(const BlockSparseView& v, int64_t b, const Element* x, int64_t x_stride, int64_t tokens,
           StreamSums<float>& sums) {
    with_width(v, [&](auto width) { dot_rows<width>(v, b, x, x_stride, tokens, sums); });
  }

  void scale(const BlockSparseView& v, int64_t b, const Element* x, int64_t x_stride,
             int64_t tokens, StreamSums<float>& sums) {
    with_width(v, [&](auto width) {
      tokens == 1 ? scale_rows<width, 1>(v, b, x, x_stride, 1, sums)
                  : scale_rows<width, 0>(v, b, x, x_stride, tokens, sums);
    });
  }

  // Interleaving two rows inside 128-bit lanes left outputs 0-3, 8-11, ... in one vector and 4-7,
  // 12-15, ... in the next.
  static void finish_scale(int64_t tokens, int64_t outputs, StreamSums<float>& sums) {
    if constexpr (kPairs) {
      const __m512i first =
          _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < outputs; k += 32) {
          float* sum = sums.total[t] + k;
          const __m512 low = _mm512_load_ps(sum), high = _mm512_load_ps(sum + 16);
          _mm512_store_ps(sum, _mm512_permutex2var_ps(low, first, high));
          _mm512_store_ps(sum + 16, _mm512_permutex2var_ps(low, second, high));
        }
      }
    }
  }

  // Calls `body` with a function that returns the next kWidth slots of the block.
  template <class F>
  static inline __attribute__((always_inline)) void read(const BlockSparseView& v, int64_t b,
                                                         F&& body) {
    const T* values = static_cast<const T*>(v.values);
    if (!v.is_bitmap()) {
      const T* from = values + b * v.slots();
      body([&]() __attribute__((always_inline)) {
        const auto slots = convert(load_all(from));
        from += kWidth;
        return slots;
      });
      return;
    }
    const T* from = values + v.block_ptr[b];
    const T* end = values + v.num_values;
    const uint8_t* mask = v.mask + b * v.slots() / 8;
    auto expand = [&](auto load_values) __attribute__((always_inline)) {
      body([&]() __attribute__((always_inline)) {
        std::conditional_t<kPairs, uint32_t, uint16_t> bits;
        memcpy(&bits, mask, sizeof bits);
        mask += sizeof bits;
        __m512i slots = load_values(from);
        from += __builtin_popcount(bits);
#if defined(__AVX512VBMI2__)
        if constexpr (kPairs) {
          return convert(expand_words(bits, slots));
        }
#endif
        asm("" : "+v"(slots));  // as in expand_words
        return convert(_mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), slots));
      });
    };
    // Only the last blocks are so near the end that a whole vector could pass it, whatever the
    // mask.
    if (end - from >= v.slots() + kWidth) {
      expand([](const T* p) __attribute__((always_inline)) { return load_all(p); });
    } else {
      expand([end](const T* p) __attribute__((always_inline)) { return load_until(p, end); });
    }
  }

  // Calls `body` with the number of vectors in a row of a block, as a constant.
  template <class F>
  static inline __attribute__((always_inline)) void with_width(const BlockSparseView& v, F&& body) {
    switch (v.bk / kWidth) {
      case 1:
        return body(std::integral_constant<int64_t, 1>{});
      case 2:
        return body(std::integral_constant<int64_t, 2>{});
      case 4:
        return body(std::integral_constant<int64_t, 4>{});
      default:
        if constexpr (!kPairs) {
          return body(std::integral_constant<int64_t, 8>{});
        }
    }
  }

 private:
  // kWidth raw elements, in the low bits of 32 where they are not pairs.
  FIPS_INLINE __m512i load_all(const T* p) {
    if constexpr (kPairs || sizeof(T) == 4) {
      return _mm512_loadu_si512(p);
    } else {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
  }
  FIPS_INLINE __m512i load_until(const T* p, const T* end) {
    const int64_t left = min_of(kWidth, max_of(0, end - p));
    const uint32_t valid = static_cast<uint32_t>((uint64_t{1} << left) - 1);
    if constexpr (kPairs) {
      return _mm512_maskz_loadu_epi16(valid, p);
    } else if constexpr (sizeof(T) == 4) {
      return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(valid), p);
    } else {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(valid), p));
    }
  }
  FIPS_INLINE auto convert(__m512i raw) {
    if constexpr (kPairs) {
      return raw;
    } else if constexpr (__is_same(T, float)) {
      return _mm512_castsi512_ps(raw);
    } else if constexpr (__is_same(T, BFloat16)) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    } else {
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw));
    }
  }
  using Slots = decltype(convert(__m512i{}));

  FIPS_INLINE Slots load_x(const Element* x) {
    if constexpr (kPairs) {
      return _mm512_loadu_si512(x);
    } else {
      return _mm512_loadu_ps(x);
    }
  }
  FIPS_INLINE __m512 multiply_add(__m512 sum, Slots a, Slots b) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      return _mm512_dpbf16_ps(sum, as_pairs(a), as_pairs(b));
    } else
#endif
    {
      return _mm512_fmadd_ps(a, b, sum);
    }
  }

  template <int64_t kVectors>
  FIPS_INLINE void dot_rows(const BlockSparseView& v, int64_t b, const Element* x, int64_t x_stride,
                            int64_t tokens, StreamSums<float>& sums) {
    read(v, b, [&](auto next) __attribute__((always_inline)) {
      if (tokens == 1) {
        Slots in[kVectors];
        for (int64_t u = 0; u < kVectors; ++u) {
          in[u] = load_x(x + kWidth * u);
        }
        for (int64_t j = 0; j < v.bn; ++j) {
          __m512 sum = sums.partial[0][j];
          for (int64_t u = 0; u < kVectors; ++u) {
            sum = multiply_add(sum, next(), in[u]);
          }
          sums.partial[0][j] = sum;
        }
        return;
      }
      for (int64_t j = 0; j < v.bn; ++j) {
        Slots weight[kVectors];
        for (int64_t u = 0; u < kVectors; ++u) {
          weight[u] = next();
        }
        for (int64_t t = 0; t < tokens; ++t) {
          __m512 sum = sums.partial[t][j];
          for (int64_t u = 0; u < kVectors; ++u) {
            sum = multiply_add(sum, weight[u], load_x(x + t * x_stride + kWidth * u));
          }
          sums.partial[t][j] = sum;
        }
      }
    });
  }

  // Two rows of the block at a time. kTokens == 1 keeps the sums in registers; 0 leaves them in
  // memory, for any number of tokens.
  template <int64_t kVectors, int64_t kTokens>
  FIPS_INLINE void scale_rows(const BlockSparseView& v, int64_t b, const Element* x,
                              int64_t x_stride, int64_t tokens, StreamSums<float>& sums) {
    constexpr int64_t kSums = kVectors * kWidth / 16;
    __m512 kept[kSums];
    if constexpr (kTokens == 1) {
      for (int64_t u = 0; u < kSums; ++u) {
        kept[u] = _mm512_load_ps(sums.total[0] + 16 * u);
      }
    }
    read(v, b, [&](auto next) __attribute__((always_inline)) {
      for (int64_t j = 0; j < v.bn; j += 2) {
        Slots row[2 * kVectors];
        for (int64_t u = 0; u < 2 * kVectors; ++u) {
          row[u] = next();
        }
        interleave<kVectors>(row);
        for (int64_t t = 0; t < (kTokens == 1 ? 1 : tokens); ++t) {
          float* total = sums.total[t];
          for (int64_t u = 0; u < kSums; ++u) {
            const __m512 sum = kTokens == 1 ? kept[u] : _mm512_load_ps(total + 16 * u);
            const __m512 next_sum = add_rows<kVectors>(sum, row, u, x + t * x_stride + j);
            if constexpr (kTokens == 1) {
              kept[u] = next_sum;
            } else {
              _mm512_store_ps(total + 16 * u, next_sum);
            }
          }
        }
      }
    });
    if constexpr (kTokens == 1) {
      for (int64_t u = 0; u < kSums; ++u) {
        _mm512_store_ps(sums.total[0] + 16 * u, kept[u]);
      }
    }
  }

 public:
  // Pairs: two rows become vectors of (first row, second row), in the order that finish_scale
  // mends.
  template <int64_t kVectors>
  FIPS_INLINE void interleave(Slots (&row)[2 * kVectors]) {
    if constexpr (kPairs) {
      for (int64_t u = 0; u < kVectors; ++u) {
        const __m512i low = _mm512_unpacklo_epi16(row[u], row[kVectors + u]);
        row[kVectors + u] = _mm512_unpackhi_epi16(row[u], row[kVectors + u]);
        row[u] = low;
      }
    }
  }

 private:
  // sum + x[0] * (first row) + x[1] * (second row), for the u-th sixteen outputs.
  template <int64_t kVectors>
  FIPS_INLINE __m512 add_rows(__m512 sum, const Slots (&row)[2 * kVectors], int64_t u,
                              const Element* x) {
    if constexpr (kPairs) {
      int32_t pair;
      memcpy(&pair, x, sizeof pair);
      const int64_t at = u % 2 == 0 ? u / 2 : kVectors + u / 2;
      return multiply_add(sum, row[at], _mm512_set1_epi32(pair));
    } else {
      return multiply_add(multiply_add(sum, row[u], _mm512_set1_ps(x[0])), row[kVectors + u],
                          _mm512_set1_ps(x[1]));
    }
  }
};
#endif

template <class T>
struct StreamOf {
  using type = StreamVectors<T>;
};
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
template <>
struct StreamOf<float> {
  using type = StreamSlots<float>;
};
template <>
struct StreamOf<BFloat16> {
  using type = StreamSlots<BFloat16>;
};
template <>
struct StreamOf<Half> {
  using type = StreamSlots<Half>;
};
#endif

}  // namespace
}  // namespace fips::cpu
