// Elements as registers hold them in the streaming kernels: loaded, converted to what the multiply
// instruction takes, broadcast. Included only from per-ISA units.
#pragma once

#include <type_traits>

#include "kernels/cpu/block_tile.h"

namespace fips::cpu {
namespace {

// The interface:
//   Stored    what the weights are
//   Element   what x is converted to beforehand
//   Register  kWidth elements; multiply_add(sum, a, b) adds kTerms products to each lane of a sum
//   Sum       kSumWidth sums
//   kParts    sums that one register of outputs feeds: kTerms rows interleaved make kParts
//             registers, in the order that finish_outputs mends
template <class T>
struct VectorLanes {
  using Stored = T;
  using Element = Accumulator<T>;
  using Register = Vector<Element>;
  using Sum = Vector<Element>;
  static constexpr int64_t kTerms = 1, kParts = 1;
  static constexpr int64_t kWidth = kLanes<Element>, kSumWidth = kLanes<Element>;

  FIPS_INLINE Register load(const T* p) {
    if constexpr (__is_same(T, Element)) {
      return cpu::load(p);
    } else {
#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (__is_same(T, BFloat16)) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      } else {
        return _mm256_cvtph_ps(half);
      }
#else
      Register v;
      for (int64_t i = 0; i < kWidth; ++i) {
        v[i] = to_accumulator(p[i]);
      }
      return v;
#endif
    }
  }
  FIPS_INLINE Register load_x(const Element* x) { return cpu::load(x); }
  FIPS_INLINE Register broadcast(const Element* x) { return *x - Register{}; }
  FIPS_INLINE Sum multiply_add(Sum sum, Register a, Register b) { return sum + a * b; }
  FIPS_INLINE Sum load_sum(const Element* p) { return cpu::load(p); }
  FIPS_INLINE void store_sum(Element* p, Sum sum) { store<Element>(p, sum); }
  FIPS_INLINE void interleave(Register (&)[1]) {}
  FIPS_INLINE void finish_outputs(Element* /*sums*/, int64_t /*outputs*/) {}

  // out[i] = the sum of the lanes of in[i], for sixteen.
  FIPS_INLINE void fold(const Sum* in, Element* out) {
    for (int64_t i = 0; i < 16; ++i) {
      out[i] = sum_lanes<Element>(in[i]);
    }
  }
};

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
// float, float16 and bfloat16 in registers of 512 bits; with kPairs, bfloat16 stays as it is, 32 to
// a register, multiplied in pairs.
template <class T, bool kPairs>
struct SlotLanes {
  using Stored = T;
  using Element = std::conditional_t<kPairs, T, float>;
  using Sum = __m512;
  static constexpr int64_t kTerms = kPairs ? 2 : 1, kParts = kTerms;
  static constexpr int64_t kWidth = 16 * kTerms, kSumWidth = 16;

  // kWidth raw elements, in the low bits of 32 where they are not pairs.
  FIPS_INLINE __m512i load_raw(const T* p) {
    if constexpr (kPairs || sizeof(T) == 4) {
      return _mm512_loadu_si512(p);
    } else {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
  }
  // The same, but none at or past `end`.
  FIPS_INLINE __m512i load_raw_until(const T* p, const T* end) {
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

  using Register = decltype(convert(__m512i{}));
  FIPS_INLINE Register load(const T* p) { return convert(load_raw(p)); }
  FIPS_INLINE Register load_x(const Element* x) {
    if constexpr (kPairs) {
      return _mm512_loadu_si512(x);
    } else {
      return _mm512_loadu_ps(x);
    }
  }
  // kTerms neighbours in every lane.
  FIPS_INLINE Register broadcast(const Element* x) {
    if constexpr (kPairs) {
      int32_t pair;
      memcpy(&pair, x, sizeof pair);
      return _mm512_set1_epi32(pair);
    } else {
      return _mm512_set1_ps(*x);
    }
  }
  FIPS_INLINE Sum multiply_add(Sum sum, Register a, Register b) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    } else
#endif
    {
      return _mm512_fmadd_ps(a, b, sum);
    }
  }
  FIPS_INLINE Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  FIPS_INLINE void store_sum(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }

  // Two rows become registers of (first row, second row).
  FIPS_INLINE void interleave(Register (&rows)[kTerms]) {
    if constexpr (kPairs) {
      const __m512i low = _mm512_unpacklo_epi16(rows[0], rows[1]);
      rows[1] = _mm512_unpackhi_epi16(rows[0], rows[1]);
      rows[0] = low;
    }
  }
  // Interleaving inside 128-bit lanes left outputs 0-3, 8-11, ... in one register and 4-7, 12-15,
  // ... in the next.
  FIPS_INLINE void finish_outputs(float* sums, int64_t outputs) {
    if constexpr (kPairs) {
      const __m512i first =
          _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      for (int64_t k = 0; k < outputs; k += 32) {
        const __m512 low = _mm512_loadu_ps(sums + k), high = _mm512_loadu_ps(sums + k + 16);
        _mm512_storeu_ps(sums + k, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(sums + k + 16, _mm512_permutex2var_ps(low, second, high));
      }
    }
  }

  // out[i] = the sum of the lanes of in[i], for sixteen.
  FIPS_INLINE void fold(const __m512* in, float* out) {
    // Each round halves the registers: neighbours are interleaved and added.
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
  }
};
#endif

// The lanes of T's accumulator.
template <class T>
struct ConvertedLanesOf {
  using type = VectorLanes<T>;
};
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
template <>
struct ConvertedLanesOf<float> {
  using type = SlotLanes<float, false>;
};
template <>
struct ConvertedLanesOf<BFloat16> {
  using type = SlotLanes<BFloat16, false>;
};
template <>
struct ConvertedLanesOf<Half> {
  using type = SlotLanes<Half, false>;
};
#endif
template <class T>
using ConvertedLanes = typename ConvertedLanesOf<T>::type;

// The lanes with the most products an instruction.
template <class T>
struct WidestLanesOf {
  using type = ConvertedLanes<T>;
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <>
struct WidestLanesOf<BFloat16> {
  using type = SlotLanes<BFloat16, true>;
};
#endif
template <class T>
using WidestLanes = typename WidestLanesOf<T>::type;

// What a product with rows of weights `length` long runs on: calls body(the lanes). Rows of
// bfloat16 too short for a register of pairs are converted.
template <class T, class F>
FIPS_INLINE auto with_lanes([[maybe_unused]] int64_t length, F&& body) {
  if constexpr (!__is_same(WidestLanes<T>, ConvertedLanes<T>)) {
    if (length % WidestLanes<T>::kWidth == 0) {
      return body(WidestLanes<T>{});
    }
  }
  return body(ConvertedLanes<T>{});
}

}  // namespace
}  // namespace fips::cpu
