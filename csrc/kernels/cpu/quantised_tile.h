// Stored blocks of quantised slices as dense tiles: code times the scale of its row, rounded to the
// type of x. Included only from per-ISA units.
//
// A block is expanded where it is used, into a buffer that stays in the first-level cache: what
// comes from memory are the codes.
#pragma once

#include "core/format.h"
#include "kernels/cpu/vector.h"

namespace fips::cpu {
namespace {

#if defined(__AVX512VBMI2__)
FIPS_INLINE __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}
#endif

// `count` codes of four bits, two to a byte and the low one first, as a byte each.
FIPS_INLINE void unpack_int4(const uint8_t* in, int64_t count, int8_t* out) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  for (; i + 64 <= count; i += 64) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i / 2));
    // Bytes become words of (low, high); xor and subtraction extend the sign.
    const __m512i words = _mm512_cvtepu8_epi16(pairs);
    const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)),
                                             _mm512_set1_epi8(0x0f));
    const __m512i eight = _mm512_set1_epi8(8);
    _mm512_storeu_si512(out + i, _mm512_sub_epi8(_mm512_xor_si512(nibbles, eight), eight));
  }
#endif
  for (; i < count; ++i) {
    const int32_t nibble = i % 2 == 0 ? in[i / 2] & 15 : in[i / 2] >> 4;
    out[i] = static_cast<int8_t>((nibble ^ 8) - 8);
  }
}

// Packed codes to the slots that `mask` marks, zeros elsewhere; at most `left` codes are read.
FIPS_INLINE void expand_codes(const uint8_t* mask, const int8_t* packed, int64_t left,
                              int64_t slots, int8_t* out) {
  for (int64_t slot = 0; slot < slots; slot += 64) {
    uint64_t bits;
    memcpy(&bits, mask + slot / 8, sizeof bits);
#if defined(__AVX512VBMI2__)
    __m512i codes = _mm512_maskz_loadu_epi8(first_bytes(left), packed);
    asm("" : "+v"(codes));  // as in expand_words
    _mm512_storeu_si512(out + slot, _mm512_maskz_expand_epi8(bits, codes));
    const int64_t used = min_of(left, __builtin_popcountll(bits));
#else
    memset(out + slot, 0, 64);
    int64_t used = 0;
    for (uint64_t rest = bits; rest != 0 && used < left; rest &= rest - 1) {
      out[slot + __builtin_ctzll(rest)] = packed[used++];
    }
#endif
    packed += used;
    left -= used;
  }
}

// The codes of stored block `b`, one byte per slot, in `scratch` (of the largest block) unless they
// are stored so.
FIPS_INLINE const int8_t* block_codes(const BlockSparseView& v, int64_t b, int8_t* scratch) {
  const int64_t first = v.is_bitmap() ? v.block_ptr[b] : b * v.slots();
  const int64_t left = v.is_bitmap() ? min_of(v.slots(), v.num_values - first) : v.slots();
  const int8_t* codes = static_cast<const int8_t*>(v.values) + first;
  int8_t unpacked[kMaxEdge * kMaxEdge];
  if (v.storage == Storage::kInt4) {
    int8_t* target = v.is_bitmap() ? unpacked : scratch;
    unpack_int4(static_cast<const uint8_t*>(v.values) + first / 2, left, target);
    codes = target;
  }
  if (v.is_bitmap()) {
    expand_codes(v.mask + b * v.slots() / 8, codes, left, v.slots(), scratch);
    codes = scratch;
  }
  return codes;
}

// out[i] = codes[i] * scale, for a multiple of 16.
template <class T>
FIPS_INLINE void scale_codes(const int8_t* codes, float scale, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += 16) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) <= 4) {
      const __m512i words =
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(words), _mm512_set1_ps(scale));
      if constexpr (__is_same(T, float)) {
        _mm512_storeu_ps(out + i, values);
        continue;
      } else if constexpr (__is_same(T, Half)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
        continue;
#if defined(__AVX512BF16__)
      } else if constexpr (__is_same(T, BFloat16)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
        continue;
#endif
      }
    }
#endif
    for (int64_t j = i; j < i + 16; ++j) {
      out[j] = FromAccumulator<T>::convert(static_cast<Accumulator<T>>(codes[j] * scale));
    }
  }
}

// Stored block `b` as [bn, bk] elements.
template <class T>
FIPS_INLINE void dequantise_block(const BlockSparseView& v, int64_t b, T* out) {
  alignas(64) int8_t scratch[kMaxEdge * kMaxEdge];
  const int8_t* codes = block_codes(v, b, scratch);
  for (int64_t j = 0; j < v.bn; ++j) {
    scale_codes(codes + j * v.bk, to_accumulator(v.scales[b * v.bn + j]), v.bk, out + j * v.bk);
  }
}

}  // namespace
}  // namespace fips::cpu
