// block_sparse_sddmm for one instruction set. A task is a stored block: its sums [bn, bk] stay in
// L1 while panels of a and b pass by, copied to contiguous zero-padded scratch so that strides,
// half types and ragged edges cost nothing inside the product.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/lanes.h"

namespace fips::cpu::FIPS_ISA {
namespace {

constexpr int64_t kPanelTokens = 64;

// Rows [first, first + count) of a [tokens, features] matrix, columns [begin, begin + edge), as
// [tokens / kTerms][edge][kTerms], zero-padded: tokens are what the product adds over.
template <class L>
FIPS_INLINE void copy_panel(const void* matrix, int64_t stride, int64_t first, int64_t count,
                            int64_t begin, int64_t edge, int64_t features,
                            typename L::Element* panel) {
  using T = typename L::Stored;
  const int64_t inside = min_of(edge, features - begin);
  const T* row = static_cast<const T*>(matrix) + first * stride + begin;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  if constexpr (L::kTerms == 2) {
    for (int64_t t = 0; t < count; t += 2, row += 2 * stride) {
      for (int64_t f = 0; f < edge; f += 16, panel += 32) {
        const __mmask16 valid =
            first_lanes(static_cast<uint32_t>(max_of(0, min_of(16, inside - f))));
        const __mmask16 next_valid = t + 1 < count ? valid : __mmask16(0);
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, row + f));
        const __m512i odd =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next_valid, row + stride + f));
        _mm512_storeu_si512(panel, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
    return;
  } else
#endif
  {
    for (int64_t t = 0; t < count; ++t, row += stride, panel += edge) {
      for (int64_t f = 0; f < inside; ++f) {
        panel[f] = to_accumulator(row[f]);
      }
      for (int64_t f = inside; f < edge; ++f) {
        panel[f] = 0;
      }
    }
  }
}

// sums[j][k] += sum over tokens of b[t][j] * a[t][k].
template <class L, int64_t kVectorsOfK>
FIPS_INLINE void multiply_panels(const typename L::Element* a, const typename L::Element* b,
                                 int64_t tokens, int64_t bk, int64_t bn,
                                 Accumulator<typename L::Stored>* sums) {
  constexpr int64_t kColumns = 8, kTerms = L::kTerms;
  for (int64_t j = 0; j < bn; j += kColumns) {
    for (int64_t k = 0; k < bk; k += kVectorsOfK * L::kSumWidth) {
      typename L::Sum acc[kColumns][kVectorsOfK];
      for (int64_t i = 0; i < kColumns; ++i) {
        for (int64_t u = 0; u < kVectorsOfK; ++u) {
          acc[i][u] = L::load_sum(sums + (j + i) * bk + k + u * L::kSumWidth);
        }
      }
      for (int64_t t = 0; t < tokens; t += kTerms) {
        typename L::Register from_a[kVectorsOfK];
        for (int64_t u = 0; u < kVectorsOfK; ++u) {
          from_a[u] = L::load_x(a + t * bk + (k + u * L::kSumWidth) * kTerms);
        }
        for (int64_t i = 0; i < kColumns; ++i) {
          const typename L::Register from_b = L::broadcast(b + t * bn + (j + i) * kTerms);
          for (int64_t u = 0; u < kVectorsOfK; ++u) {
            acc[i][u] = L::multiply_add(acc[i][u], from_b, from_a[u]);
          }
        }
      }
      for (int64_t i = 0; i < kColumns; ++i) {
        for (int64_t u = 0; u < kVectorsOfK; ++u) {
          L::store_sum(sums + (j + i) * bk + k + u * L::kSumWidth, acc[i][u]);
        }
      }
    }
  }
}

// Writes the sums of stored block `b` to the output, packed for `bitmap`.
template <class A>
FIPS_INLINE void write_block(const BlockSparseSddmmParams& p, int64_t b, const A* sums) {
  A* out = static_cast<A*>(p.out);
  if (!p.v.is_bitmap()) {
    A* block = out + b * p.v.slots();
    for (int64_t i = 0; i < p.v.slots(); ++i) {
      block[i] = sums[i] + (p.accumulate ? block[i] : A(0));
    }
    return;
  }
  const uint8_t* mask = p.v.mask + b * p.v.slots() / 8;
  A* packed = out + p.v.block_ptr[b];
  for (int64_t byte = 0; byte < p.v.slots() / 8; ++byte) {
    for (uint32_t rest = mask[byte]; rest != 0; rest &= rest - 1, ++packed) {
      *packed = sums[byte * 8 + __builtin_ctz(rest)] + (p.accumulate ? *packed : A(0));
    }
  }
}

template <class L>
void sample_blocks(const BlockSparseSddmmParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<typename L::Stored>;
  const BlockSparseView& v = p.v;
  alignas(64) typename L::Element a[kPanelTokens * kMaxEdge];
  alignas(64) typename L::Element b[kPanelTokens * kMaxEdge];
  alignas(64) A sums[kMaxEdge * kMaxEdge];
  int64_t column = 0;
  for (int64_t block = begin; block < end; ++block) {
    while (v.col_ptr[column + 1] <= block) {
      ++column;
    }
    memset(sums, 0, static_cast<size_t>(v.slots()) * sizeof(A));
    for (int64_t t = 0; t < p.tokens; t += kPanelTokens) {
      const int64_t count = min_of(kPanelTokens, p.tokens - t);
      copy_panel<L>(p.a, p.a_stride, t, count, int64_t{v.row_idx[block]} * v.bk, v.bk, v.rows, a);
      copy_panel<L>(p.b, p.b_stride, t, count, column * v.bn, v.bn, v.cols, b);
      if (v.bk % (2 * L::kSumWidth) == 0) {
        multiply_panels<L, 2>(a, b, count, v.bk, v.bn, sums);
      } else {
        multiply_panels<L, 1>(a, b, count, v.bk, v.bn, sums);
      }
    }
    write_block<A>(p, block, sums);
  }
}

void sddmm(const BlockSparseSddmmParams& p, int64_t begin, int64_t end) {
  with_element_type(p.v.dtype, [&](auto element) {
    sample_blocks<WidestLanes<decltype(element)>>(p, begin, end);
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
