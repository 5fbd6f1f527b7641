// Stored blocks as dense tiles. Included only from per-ISA units.
#pragma once

#include "core/format.h"
#include "kernels/cpu/quantised_tile.h"
#include "kernels/cpu/vector.h"

namespace fips::cpu {
namespace {

FIPS_INLINE uint32_t bits_at(const uint8_t* mask, int64_t slot) {
  uint16_t bits;
  memcpy(&bits, mask + slot / 8, 2);
  return bits;
}

#if defined(__AVX512F__)
FIPS_INLINE __mmask16 first_lanes(uint32_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
#endif

// Sixteen slots from packed values, zeros where `bits` has none; reads nothing at or past `end`.
// Returns the values consumed. Moves raw elements, so bfloat16 and float16 share one path.
template <class E>
FIPS_INLINE int64_t expand_sixteen(uint32_t bits, const E* packed, const E* end, E* out) {
  const int64_t left = max_of(0, end - packed);
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(E) == 2 || sizeof(E) == 4) {
    const int64_t count = __builtin_popcount(bits);
    const __mmask16 valid = first_lanes(static_cast<uint32_t>(min_of(count, left)));
    if constexpr (sizeof(E) == 4) {
      const __m512i values = _mm512_maskz_loadu_epi32(valid, packed);
      _mm512_storeu_si512(out, _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), values));
    } else {
      const __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, packed));
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(out),
          _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), values)));
    }
    return count;
  }
#endif
  int64_t used = 0;
  for (int64_t i = 0; i < 16; ++i) {
    out[i] = E{};
  }
  for (uint32_t rest = bits; rest != 0 && used < left; rest &= rest - 1) {
    out[__builtin_ctz(rest)] = packed[used++];
  }
  return used;
}

#if defined(__AVX512VBMI2__)
// Thirty-two packed values of 16 bits to the slots that `bits` marks. The values come from a
// register: with a memory operand some processors run this instruction slot by slot.
FIPS_INLINE __m512i expand_words(uint32_t bits, __m512i values) {
  asm("" : "+v"(values));
  return _mm512_maskz_expand_epi16(bits, values);
}

// Up to thirty-two values of 16 bits, none at or past `end`.
FIPS_INLINE __m512i load_words(const uint16_t* from, const uint16_t* end) {
  const int64_t left = max_of(0, end - from);
  return left >= 32 ? _mm512_loadu_si512(from)
                    : _mm512_maskz_loadu_epi16((uint32_t{1} << left) - 1u, from);
}
#endif

// The slots of a block [bn, bk] lie in one row of bits, and its packed values in the same order.
// `slots`, whole rows of the block, is a multiple of 32 for types of 16 bits where VBMI2 is there.
// Returns the values consumed.
template <class E>
FIPS_INLINE int64_t expand_block(const uint8_t* mask, const E* packed, const E* end, int64_t slots,
                                 E* out) {
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(E) == 2) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(packed);
    const uint16_t* limit = reinterpret_cast<const uint16_t*>(end);
    for (int64_t slot = 0; slot < slots; slot += 32) {
      uint32_t bits;
      memcpy(&bits, mask + slot / 8, 4);
      _mm512_storeu_si512(out + slot, expand_words(bits, load_words(from, limit)));
      from += __builtin_popcount(bits);
    }
    return from - reinterpret_cast<const uint16_t*>(packed);
  }
#endif
  const E* from = packed;
  for (int64_t slot = 0; slot < slots; slot += 16) {
    from += expand_sixteen(bits_at(mask, slot), from, end, out + slot);
  }
  return from - packed;
}

// Stored block `b` as [bn, bk] elements: the values themselves, or expanded into `scratch`.
template <class T>
FIPS_INLINE const T* block_elements(const BlockSparseView& v, int64_t b, T* scratch) {
  if (v.is_quantised()) {
    dequantise_block(v, b, scratch);
    return scratch;
  }
  const T* values = static_cast<const T*>(v.values);
  if (!v.is_bitmap()) {
    return values + b * v.slots();
  }
  expand_block(v.mask + b * v.slots() / 8, values + v.block_ptr[b], values + v.num_values,
               v.slots(), scratch);
  return scratch;
}

}  // namespace
}  // namespace fips::cpu
