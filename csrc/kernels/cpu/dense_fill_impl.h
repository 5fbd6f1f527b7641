// dense_fill for one instruction set: moving values between packed blocks and a zero-filled matrix.
// Raw elements are moved, so bfloat16 and float16 share one path.
#pragma once

#include "kernels/cpu/block_tile.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// out[i] (+)= the slots of `row` that `bits` marks, packed. Returns the values written.
template <class T>
FIPS_INLINE int64_t compress_sixteen(uint32_t bits, const T* row, Accumulator<T>* out,
                                     bool accumulate) {
  using A = Accumulator<T>;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) <= 4) {
    const uint32_t count = static_cast<uint32_t>(__builtin_popcount(bits));
    __m512 values;
    if constexpr (__is_same(T, float)) {
      values = _mm512_loadu_ps(row);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
      if constexpr (__is_same(T, BFloat16)) {
        values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      } else {
        values = _mm512_cvtph_ps(half);
      }
    }
    values = _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), values);
    if (accumulate) {
      values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(first_lanes(count), out));
    }
    _mm512_mask_storeu_ps(out, first_lanes(count), values);
    return count;
  }
#endif
  int64_t written = 0;
  for (uint32_t rest = bits; rest != 0; rest &= rest - 1, ++written) {
    const A value = to_accumulator(row[__builtin_ctz(rest)]);
    out[written] = accumulate ? out[written] + value : value;
  }
  return written;
}

// Row `j` of a block goes through `scratch` only where it is ragged.
template <class E>
void fill_columns(const BlockSparseView& v, E* out, int64_t begin, int64_t end) {
  const E* values = static_cast<const E*>(v.values);
  E scratch[kMaxEdge];
  for (int64_t edge = begin; edge < end; ++edge) {
    const int64_t column = edge * v.bn, cols = min_of(v.bn, v.cols - column);
    memset(out + column * v.rows, 0, static_cast<size_t>(cols * v.rows) * sizeof(E));
    for (int64_t b = v.col_ptr[edge]; b < v.col_ptr[edge + 1]; ++b) {
      const int64_t row = int64_t{v.row_idx[b]} * v.bk, rows = min_of(v.bk, v.rows - row);
      const E* block = values + (v.is_bitmap() ? v.block_ptr[b] : b * v.slots());
      const uint8_t* mask = v.is_bitmap() ? v.mask + b * v.slots() / 8 : nullptr;
      for (int64_t j = 0; j < cols; ++j) {
        E* target = out + (column + j) * v.rows + row;
        if (mask == nullptr) {
          memcpy(target, block + j * v.bk, static_cast<size_t>(rows) * sizeof(E));
          continue;
        }
        E* whole = rows == v.bk ? target : scratch;
        for (int64_t k = 0; k < v.bk; k += 16) {
          block += expand_sixteen(bits_at(mask + j * v.bk / 8, k), block, values + v.num_values,
                                  whole + k);
        }
        if (whole == scratch) {
          memcpy(target, scratch, static_cast<size_t>(rows) * sizeof(E));
        }
      }
    }
  }
}

template <class T>
void fill_dequantised(const BlockSparseView& v, T* out, int64_t begin, int64_t end) {
  alignas(64) T block[kMaxEdge * kMaxEdge];
  for (int64_t edge = begin; edge < end; ++edge) {
    const int64_t column = edge * v.bn, cols = min_of(v.bn, v.cols - column);
    memset(out + column * v.rows, 0, static_cast<size_t>(cols * v.rows) * sizeof(T));
    for (int64_t b = v.col_ptr[edge]; b < v.col_ptr[edge + 1]; ++b) {
      const int64_t row = int64_t{v.row_idx[b]} * v.bk, rows = min_of(v.bk, v.rows - row);
      dequantise_block(v, b, block);
      for (int64_t j = 0; j < cols; ++j) {
        memcpy(out + (column + j) * v.rows + row, block + j * v.bk,
               static_cast<size_t>(rows) * sizeof(T));
      }
    }
  }
}

template <class T>
void gather_columns(const GatherParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const BlockSparseView& v = p.v;
  const T* dense = static_cast<const T*>(p.dense);
  T scratch[kMaxEdge];
  for (int64_t edge = begin; edge < end; ++edge) {
    const int64_t column = edge * v.bn;
    for (int64_t b = v.col_ptr[edge]; b < v.col_ptr[edge + 1]; ++b) {
      const int64_t row = int64_t{v.row_idx[b]} * v.bk, rows = min_of(v.bk, v.rows - row);
      A* block = static_cast<A*>(p.out) + (v.is_bitmap() ? v.block_ptr[b] : b * v.slots());
      const uint8_t* mask = v.is_bitmap() ? v.mask + b * v.slots() / 8 : nullptr;
      for (int64_t j = 0; j < v.bn; ++j) {
        const T* source = dense + (column + j) * v.rows + row;
        if (rows < v.bk || column + j >= v.cols) {  // padding reads as zeros
          memset(scratch, 0, sizeof scratch);
          if (column + j < v.cols) {
            memcpy(scratch, source, static_cast<size_t>(rows) * sizeof(T));
          }
          source = scratch;
        }
        for (int64_t k = 0; k < v.bk; k += 16) {
          const uint32_t bits = mask == nullptr ? 0xffffu : bits_at(mask + j * v.bk / 8, k);
          block += compress_sixteen(bits, source + k, block, p.accumulate);
        }
      }
    }
  }
}

void fill(const BlockSparseView& v, void* out, int64_t begin, int64_t end) {
  if (v.is_quantised()) {
    return with_element_type(v.dtype, [&](auto element) {
      fill_dequantised(v, static_cast<decltype(element)*>(out), begin, end);
    });
  }
  switch (element_size(v.dtype)) {
    case 8:
      return fill_columns(v, static_cast<uint64_t*>(out), begin, end);
    case 4:
      return fill_columns(v, static_cast<uint32_t*>(out), begin, end);
    default:
      return fill_columns(v, static_cast<uint16_t*>(out), begin, end);
  }
}

void gather(const GatherParams& p, int64_t begin, int64_t end) {
  with_element_type(p.dense_dtype,
                    [&](auto element) { gather_columns<decltype(element)>(p, begin, end); });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
