// One stored block as a dense [bn, bk] tile in the accumulator type. Included only from per-ISA
// units.
#pragma once

#include "core/format.h"
#include "kernels/cpu/vector.h"

namespace fips::cpu {
namespace {

constexpr int64_t kMaxEdge = 128;

// Expands the packed values of one row of a block: `mask` has bk bits; returns the values consumed.
template <class T>
FIPS_INLINE int64_t expand_row(const uint8_t* mask, const T* values, int64_t bk,
                               Accumulator<T>* out) {
  int64_t used = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) <= 4) {
    for (int64_t k = 0; k < bk; k += 16) {
      uint16_t bits;
      memcpy(&bits, mask + k / 8, 2);
      const int count = __builtin_popcount(bits);
      // The load is masked to `count` lanes: the last block must not read past the end of the
      // values.
      const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1u);
      __m512 packed;
      if constexpr (sizeof(T) == 4) {
        packed = _mm512_maskz_loadu_ps(valid, values + used);
      } else {
        const __m256i half = _mm256_maskz_loadu_epi16(valid, values + used);
        if constexpr (__is_same(T, BFloat16)) {
          packed = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        } else {
          packed = _mm512_cvtph_ps(half);
        }
      }
      _mm512_storeu_ps(out + k, _mm512_maskz_expand_ps(bits, packed));
      used += count;
    }
    return used;
  }
#endif
  for (int64_t k = 0; k < bk; k += 16) {
    uint16_t bits;
    memcpy(&bits, mask + k / 8, 2);
    for (int64_t i = 0; i < 16; ++i) {
      out[k + i] = 0;
    }
    for (uint32_t rest = bits; rest != 0; rest &= rest - 1) {
      out[k + __builtin_ctz(rest)] = to_accumulator(values[used++]);
    }
  }
  return used;
}

// Returns the tile of stored block `b`: the values themselves where they already are one, else
// `scratch`.
template <class T>
FIPS_INLINE const Accumulator<T>* load_tile(const BlockSparseView& v, int64_t b,
                                            Accumulator<T>* scratch) {
  const T* values = static_cast<const T*>(v.values);
  if (v.is_bitmap()) {
    const uint8_t* mask = v.mask + b * v.slots() / 8;
    const T* packed = values + v.block_ptr[b];
    for (int64_t j = 0; j < v.bn; ++j) {
      packed += expand_row(mask + j * v.bk / 8, packed, v.bk, scratch + j * v.bk);
    }
    return scratch;
  }
  const T* block = values + b * v.slots();
  if constexpr (__is_same(T, Accumulator<T>)) {
    return block;
  } else {
    for (int64_t i = 0; i < v.slots(); ++i) {
      scratch[i] = to_accumulator(block[i]);
    }
    return scratch;
  }
}

}  // namespace
}  // namespace fips::cpu
