// block_sparse_sddmm for one instruction set. A task is a stored block: its sums [bn, bk] stay in
// L1 while panels of a and b pass by, copied to contiguous zero-padded scratch so that strides,
// half types and ragged edges cost nothing inside the product.
#pragma once

#include "kernels/cpu/block_tile.h"
#include "kernels/cpu/dispatch.h"

namespace fips::cpu::FIPS_ISA {
namespace {

constexpr int64_t kPanelTokens = 64;

// Rows [first, first + count) of a [tokens, features] matrix, columns [begin, begin + edge),
// zero-padded.
template <class T>
FIPS_INLINE void copy_panel(const void* matrix, int64_t stride, int64_t first, int64_t count,
                            int64_t begin, int64_t edge, int64_t features, Accumulator<T>* panel) {
  const int64_t inside = min_of(edge, features - begin);
  for (int64_t t = 0; t < count; ++t) {
    const T* row = static_cast<const T*>(matrix) + (first + t) * stride + begin;
    Accumulator<T>* out = panel + t * edge;
    for (int64_t f = 0; f < inside; ++f) {
      out[f] = to_accumulator(row[f]);
    }
    for (int64_t f = inside; f < edge; ++f) {
      out[f] = 0;
    }
  }
}

// sums[j][k] += sum over tokens of b[t][j] * a[t][k].
template <class A, int64_t kVectorsOfK>
FIPS_INLINE void multiply_panels(const A* a, const A* b, int64_t tokens, int64_t bk, int64_t bn,
                                 A* sums) {
  constexpr int64_t kColumns = 8;
  for (int64_t j = 0; j < bn; j += kColumns) {
    for (int64_t k = 0; k < bk; k += kVectorsOfK * kLanes<A>) {
      Vector<A> acc[kColumns][kVectorsOfK];
      for (int64_t i = 0; i < kColumns; ++i) {
        for (int64_t u = 0; u < kVectorsOfK; ++u) {
          acc[i][u] = load(sums + (j + i) * bk + k + u * kLanes<A>);
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < kColumns; ++i) {
          for (int64_t u = 0; u < kVectorsOfK; ++u) {
            acc[i][u] += b[t * bn + j + i] * load(a + t * bk + k + u * kLanes<A>);
          }
        }
      }
      for (int64_t i = 0; i < kColumns; ++i) {
        for (int64_t u = 0; u < kVectorsOfK; ++u) {
          store<A>(sums + (j + i) * bk + k + u * kLanes<A>, acc[i][u]);
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

template <class T>
void sample_blocks(const BlockSparseSddmmParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const BlockSparseView& v = p.v;
  alignas(64) A a[kPanelTokens * kMaxEdge];
  alignas(64) A b[kPanelTokens * kMaxEdge];
  alignas(64) A sums[kMaxEdge * kMaxEdge];
  int64_t column = 0;
  for (int64_t block = begin; block < end; ++block) {
    while (v.col_ptr[column + 1] <= block) {
      ++column;
    }
    memset(sums, 0, static_cast<size_t>(v.slots()) * sizeof(A));
    for (int64_t t = 0; t < p.tokens; t += kPanelTokens) {
      const int64_t count = min_of(kPanelTokens, p.tokens - t);
      copy_panel<T>(p.a, p.a_stride, t, count, int64_t{v.row_idx[block]} * v.bk, v.bk, v.rows, a);
      copy_panel<T>(p.b, p.b_stride, t, count, column * v.bn, v.bn, v.cols, b);
      if (v.bk % (2 * kLanes<A>) == 0) {
        multiply_panels<A, 2>(a, b, count, v.bk, v.bn, sums);
      } else {
        multiply_panels<A, 1>(a, b, count, v.bk, v.bn, sums);
      }
    }
    write_block<A>(p, block, sums);
  }
}

void sddmm(const BlockSparseSddmmParams& p, int64_t begin, int64_t end) {
  switch (p.v.dtype) {
    case DType::kFloat32:
      return sample_blocks<float>(p, begin, end);
    case DType::kFloat64:
      return sample_blocks<double>(p, begin, end);
    case DType::kBFloat16:
      return sample_blocks<BFloat16>(p, begin, end);
    case DType::kFloat16:
      return sample_blocks<Half>(p, begin, end);
  }
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
