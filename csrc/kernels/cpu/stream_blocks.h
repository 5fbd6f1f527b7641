// The blocks of an output edge times a few tokens. k, contiguous in a block, is the vector
// dimension in both directions. Included only from per-ISA units.
#pragma once

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/token_products.h"

namespace fips::cpu {
namespace {

// The sums of an output edge.
template <class A>
struct StreamSums {
  alignas(64) A total[kFewTokens][kMaxEdge];
};

// Calls `body` with a function that returns the next register of the block's slots, in order.
template <class L, class F>
static inline __attribute__((always_inline)) void read_slots(const BlockSparseView& v, int64_t b,
                                                             typename L::Stored* scratch,
                                                             F&& body) {
  using T = typename L::Stored;
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
  if constexpr (!__is_same(T, double)) {
    if (v.is_bitmap() && !v.is_quantised()) {
      const T* from = static_cast<const T*>(v.values) + v.block_ptr[b];
      const T* end = static_cast<const T*>(v.values) + v.num_values;
      const uint8_t* mask = v.mask + b * v.slots() / 8;
      auto expand = [&](auto load_values) __attribute__((always_inline)) {
        body([&]() __attribute__((always_inline)) {
          std::conditional_t<L::kTerms == 2, uint32_t, uint16_t> bits;
          memcpy(&bits, mask, sizeof bits);
          mask += sizeof bits;
          __m512i slots = load_values(from);
          from += __builtin_popcount(bits);
#if defined(__AVX512VBMI2__)
          if constexpr (L::kTerms == 2) {
            return L::convert(expand_words(bits, slots));
          }
#endif
          asm("" : "+v"(slots));  // as in expand_words
          return L::convert(_mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), slots));
        });
      };
      // Only the last blocks are so near the end that a whole register could pass it, whatever the
      // mask.
      if (end - from >= v.slots() + L::kWidth) {
        expand([](const T* p) __attribute__((always_inline)) { return L::load_raw(p); });
      } else {
        expand([end](const T* p)
                   __attribute__((always_inline)) { return L::load_raw_until(p, end); });
      }
      return;
    }
  }
#endif
  const T* from = block_elements(v, b, scratch);
  body([&]() __attribute__((always_inline)) {
    const auto slots = L::load(from);
    from += L::kWidth;
    return slots;
  });
}

// One token. Every stored byte is read once, in order, and used where it lands: expanded and
// converted in registers.
template <class L>
class OneToken {
  using T = typename L::Stored;
  using A = Accumulator<T>;
  using Element = typename L::Element;

 public:
  // Forward: begin, the edge's blocks, end.
  void begin_dots(int64_t outputs) {
    memset(partial_, 0, static_cast<size_t>(outputs) * sizeof partial_[0]);
  }
  void add_dots(const BlockSparseView& v, int64_t b, const Element* x) {
    with_registers(v, [&](auto registers) __attribute__((always_inline)) {
      read_slots<L>(v, b, scratch_, [&](auto next) __attribute__((always_inline)) {
        constexpr int64_t kRegisters = registers;
        typename L::Register in[kRegisters];
        for (int64_t u = 0; u < kRegisters; ++u) {
          in[u] = L::load_x(x + L::kWidth * u);
        }
        for (int64_t j = 0; j < v.bn; ++j) {
          typename L::Sum sum = partial_[j];
          for (int64_t u = 0; u < kRegisters; ++u) {
            sum = L::multiply_add(sum, next(), in[u]);
          }
          partial_[j] = sum;
        }
      });
    });
  }
  void end_dots(int64_t outputs, A* total) const {
    for (int64_t j = 0; j < outputs; j += 16) {
      L::fold(partial_ + j, total + j);
    }
  }

  // Transposed: adds to `total`, in the order that L::finish_outputs mends.
  void add_scales(const BlockSparseView& v, int64_t b, const Element* x, A* total) {
    with_registers(v, [&](auto registers) __attribute__((always_inline)) {
      constexpr int64_t kRegisters = registers, kSums = kRegisters * L::kParts;
      typename L::Sum sums[kSums];
      for (int64_t u = 0; u < kSums; ++u) {
        sums[u] = L::load_sum(total + L::kSumWidth * u);
      }
      read_slots<L>(v, b, scratch_, [&](auto next) __attribute__((always_inline)) {
        for (int64_t j = 0; j < v.bn; j += L::kTerms) {
          typename L::Register rows[kRegisters][L::kTerms];
          for (int64_t i = 0; i < L::kTerms; ++i) {
            for (int64_t u = 0; u < kRegisters; ++u) {
              rows[u][i] = next();
            }
          }
          const typename L::Register in = L::broadcast(x + j);
          for (int64_t u = 0; u < kRegisters; ++u) {
            L::interleave(rows[u]);
            for (int64_t i = 0; i < L::kParts; ++i) {
              sums[u * L::kParts + i] = L::multiply_add(sums[u * L::kParts + i], rows[u][i], in);
            }
          }
        }
      });
      for (int64_t u = 0; u < kSums; ++u) {
        L::store_sum(total + L::kSumWidth * u, sums[u]);
      }
    });
  }

 private:
  // Calls `body` with the number of registers in a row of a block, as a constant.
  template <int64_t kCount = 1, class F>
  static inline __attribute__((always_inline)) void with_registers(const BlockSparseView& v,
                                                                   F&& body) {
    if constexpr (2 * kCount * L::kWidth <= kMaxEdge) {
      if (v.bk > kCount * L::kWidth) {
        return with_registers<2 * kCount>(v, body);
      }
    }
    body(std::integral_constant<int64_t, kCount>{});
  }

  alignas(64) typename L::Sum partial_[kMaxEdge];
  alignas(64) T scratch_[kMaxEdge * kMaxEdge];
};

// Up to kMostTokens tokens. Forward, a few rows of every block of the edge at a time, so that their
// sums never leave the registers; what a bitmap leaves out is filled in just before.
template <class L>
class FewTokens {
  static_assert(kVectorTokens <= kMostTokens);
  using T = typename L::Stored;
  using A = Accumulator<T>;
  using Element = typename L::Element;

 public:
  explicit FewTokens(int64_t tokens) : tokens_(tokens) {}

  // Forward: the edge's blocks, then end.
  void add_dots(const BlockSparseView& v, int64_t b, const Element* x, int64_t x_stride,
                StreamSums<A>& sums) {
    if (used_ == kBlocks) {
      end_dots(v, x_stride, sums);
    }
    if (v.is_quantised()) {
      blocks_[used_++] = {block_elements(v, b, scratch_), nullptr, x};
      return end_dots(v, x_stride, sums);
    }
    const int64_t first = v.is_bitmap() ? v.block_ptr[b] : b * v.slots();
    blocks_[used_++] = {static_cast<const T*>(v.values) + first,
                        v.is_bitmap() ? v.mask + b * v.slots() / 8 : nullptr, x};
  }
  void end_dots(const BlockSparseView& v, int64_t x_stride, StreamSums<A>& sums) {
    with_tokens(tokens_, [&](auto tokens) { multiply_rows<tokens>(v, x_stride, sums); });
    used_ = 0;
  }

  // Transposed: adds to the totals, in the order that L::finish_outputs mends.
  void add_scales(const BlockSparseView& v, int64_t b, const Element* x, int64_t x_stride,
                  StreamSums<A>& sums) {
    const T* weights = block_elements(v, b, scratch_);
    with_tokens(tokens_, [&](auto tokens) {
      TokenScales<L, tokens>::add(weights, v.bk, v.bn, x, x_stride, v.bk, sums.total[0], kMaxEdge);
    });
  }

 private:
  struct Block {
    const T* values;
    const uint8_t* mask;  // null: every slot has a value
    const Element* x;
  };
  // Blocks at a time: their rows of x stay in the first-level cache.
  static constexpr int64_t kBlocks = 16;
  // Rows ahead: the next ones of a block are read after those of the others, out of order for a
  // prefetcher.
  static constexpr int64_t kAhead = 4;

  template <int64_t kTokens>
  void multiply_rows(const BlockSparseView& v, int64_t x_stride, StreamSums<A>& sums) {
    constexpr int64_t kRows = TokenDots<L, kTokens>::kRows;
    const T* end = static_cast<const T*>(v.values) + (v.is_bitmap() ? v.num_values : 0);
    for (int64_t j = 0; j < v.bn; j += kRows) {
      TokenDots<L, kTokens> dots;
      for (int64_t i = 0; i < used_; ++i) {
        Block& block = blocks_[i];
        const int64_t slots = kRows * v.bk;
        const T* rows = block.values;
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
        if (block.mask == nullptr) {
          for (int64_t slot = 0; slot < slots; slot += kLine) {
            __builtin_prefetch(rows + kAhead * slots + slot);
          }
          block.values += slots;
        } else {
          block.values += expand_block(block.mask, rows, end, slots, scratch_);
          block.mask += slots / 8;
          rows = scratch_;
          for (int64_t slot = 0; slot < slots; slot += kLine) {
            __builtin_prefetch(block.values + slots + slot);
          }
        }
        dots.add(rows, v.bk, block.x, x_stride, v.bk);
      }
      dots.finish([&](int64_t row, int64_t token, A sum)
                      __attribute__((always_inline)) { sums.total[token][j + row] += sum; });
    }
  }

  int64_t tokens_, used_ = 0;
  Block blocks_[kBlocks];
  alignas(64) T scratch_[kMaxEdge * kMaxEdge];
};

}  // namespace
}  // namespace fips::cpu
