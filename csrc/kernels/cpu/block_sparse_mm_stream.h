// block_sparse_mm for one instruction set: a few tokens. Every stored byte is read once, in order,
// and used where it lands, so that the time is that of the bytes. A task is an output edge; k,
// contiguous in a block, is the vector dimension in both directions.
#pragma once

#include "kernels/cpu/block_sparse_mm_impl.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// Partial sums of up to kStreamTokens tokens: vectors per output (forward, folded at the end of an
// edge), or one number per output (transposed).
template <class A>
struct StreamSums {
  alignas(64) Vector<A> partial[kStreamTokens][kMaxEdge];
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

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
// Streams bfloat16 in vectors of 32, expanded in registers where they are packed; blocks at least
// 32 deep.
class StreamPairs {
 public:
  using A = float;
  using Element = BFloat16;

  void dot(const BlockSparseView& v, int64_t b, const BFloat16* x, int64_t x_stride, int64_t tokens,
           StreamSums<float>& sums) {
    with_width(v, [&](auto width) { dot_rows<width>(v, b, x, x_stride, tokens, sums); });
  }

  void scale(const BlockSparseView& v, int64_t b, const BFloat16* x, int64_t x_stride,
             int64_t tokens, StreamSums<float>& sums) {
    with_width(v, [&](auto width) { scale_rows<width>(v, b, x, x_stride, tokens, sums); });
  }

  // Interleaving two rows inside 128-bit lanes left outputs 0-3, 8-11, ... in one vector and 4-7,
  // 12-15, ... in the next.
  void finish_scale(int64_t tokens, int64_t outputs, StreamSums<float>& sums) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < outputs; k += 32) {
        const __m512 low = _mm512_load_ps(sums.total[t] + k);
        const __m512 high = _mm512_load_ps(sums.total[t] + k + 16);
        _mm512_store_ps(sums.total[t] + k, _mm512_permutex2var_ps(low, first, high));
        _mm512_store_ps(sums.total[t] + k + 16, _mm512_permutex2var_ps(low, second, high));
      }
    }
  }

 private:
  // Calls `body` with the number of vectors in a row of a block, as a constant.
  template <class F>
  FIPS_INLINE void with_width(const BlockSparseView& v, F&& body) {
    switch (v.bk) {
      case 32:
        return body(std::integral_constant<int64_t, 1>{});
      case 64:
        return body(std::integral_constant<int64_t, 2>{});
      default:
        return body(std::integral_constant<int64_t, 4>{});
    }
  }

  // Calls `body` with a function that returns the next 32 slots of the block.
  template <class F>
  FIPS_INLINE void read(const BlockSparseView& v, int64_t b, F&& body) {
    const uint16_t* values = static_cast<const uint16_t*>(v.values);
    if (!v.is_bitmap()) {
      const uint16_t* from = values + b * v.slots();
      body([&]() __attribute__((always_inline)) {
        const __m512i slots = _mm512_loadu_si512(from);
        from += 32;
        return slots;
      });
      return;
    }
    const uint16_t* from = values + v.block_ptr[b];
    const uint16_t* end = values + v.num_values;
    const uint8_t* mask = v.mask + b * v.slots() / 8;
    auto expand = [&](auto load_values) {
      body([&]() __attribute__((always_inline)) {
        uint32_t bits;
        memcpy(&bits, mask, sizeof bits);
        mask += sizeof bits;
        const __m512i slots = expand_words(bits, load_values(from));
        from += __builtin_popcount(bits);
        return slots;
      });
    };
    // Only the last blocks are so near the end that a whole vector could pass it, whatever the
    // mask.
    if (end - from >= v.slots() + 32) {
      expand([](const uint16_t* p)
                 __attribute__((always_inline)) { return _mm512_loadu_si512(p); });
    } else {
      expand([end](const uint16_t* p)
                 __attribute__((always_inline)) { return load_words(p, end); });
    }
  }

  template <int64_t kVectors>
  FIPS_INLINE void dot_rows(const BlockSparseView& v, int64_t b, const BFloat16* x,
                            int64_t x_stride, int64_t tokens, StreamSums<float>& sums) {
    read(v, b, [&](auto next) {
      if (tokens == 1) {
        __m512bh in[kVectors];
        for (int64_t u = 0; u < kVectors; ++u) {
          in[u] = as_pairs(_mm512_loadu_si512(x + 32 * u));
        }
        for (int64_t j = 0; j < v.bn; ++j) {
          __m512 sum = sums.partial[0][j];
          for (int64_t u = 0; u < kVectors; ++u) {
            sum = _mm512_dpbf16_ps(sum, as_pairs(next()), in[u]);
          }
          sums.partial[0][j] = sum;
        }
        return;
      }
      for (int64_t j = 0; j < v.bn; ++j) {
        __m512bh weight[kVectors];
        for (int64_t u = 0; u < kVectors; ++u) {
          weight[u] = as_pairs(next());
        }
        for (int64_t t = 0; t < tokens; ++t) {
          __m512 sum = sums.partial[t][j];
          for (int64_t u = 0; u < kVectors; ++u) {
            sum = _mm512_dpbf16_ps(sum, weight[u],
                                   as_pairs(_mm512_loadu_si512(x + t * x_stride + 32 * u)));
          }
          sums.partial[t][j] = sum;
        }
      }
    });
  }

  template <int64_t kVectors>
  FIPS_INLINE void scale_rows(const BlockSparseView& v, int64_t b, const BFloat16* x,
                              int64_t x_stride, int64_t tokens, StreamSums<float>& sums) {
    read(v, b, [&](auto next) {
      if (tokens == 1) {
        scale_rows_of<kVectors, 1>(v, next, x, x_stride, 1, sums);
      } else {
        scale_rows_of<kVectors, 0>(v, next, x, x_stride, tokens, sums);
      }
    });
  }

  // kTokens == 1 keeps the sums in registers; 0 leaves them in memory, for any number.
  template <int64_t kVectors, int64_t kTokens, class Next>
  FIPS_INLINE void scale_rows_of(const BlockSparseView& v, Next& next, const BFloat16* x,
                                 int64_t x_stride, int64_t tokens, StreamSums<float>& sums) {
    __m512 acc[2 * kVectors];
    if constexpr (kTokens == 1) {
      for (int64_t u = 0; u < 2 * kVectors; ++u) {
        acc[u] = _mm512_load_ps(sums.total[0] + 16 * u);
      }
    }
    for (int64_t j = 0; j < v.bn; j += 2) {
      __m512i row[2 * kVectors];
      for (int64_t u = 0; u < 2 * kVectors; ++u) {
        row[u] = next();
      }
      __m512bh weight[2 * kVectors];
      for (int64_t u = 0; u < kVectors; ++u) {
        weight[2 * u] = as_pairs(_mm512_unpacklo_epi16(row[u], row[kVectors + u]));
        weight[2 * u + 1] = as_pairs(_mm512_unpackhi_epi16(row[u], row[kVectors + u]));
      }
      for (int64_t t = 0; t < (kTokens == 1 ? 1 : tokens); ++t) {
        int32_t pair;
        memcpy(&pair, x + t * x_stride + j, sizeof pair);
        const __m512bh value = as_pairs(_mm512_set1_epi32(pair));
        for (int64_t u = 0; u < 2 * kVectors; ++u) {
          if constexpr (kTokens == 1) {
            acc[u] = _mm512_dpbf16_ps(acc[u], value, weight[u]);
          } else {
            float* sum = sums.total[t] + 16 * u;
            _mm512_store_ps(sum, _mm512_dpbf16_ps(_mm512_load_ps(sum), value, weight[u]));
          }
        }
      }
    }
    if constexpr (kTokens == 1) {
      for (int64_t u = 0; u < 2 * kVectors; ++u) {
        _mm512_store_ps(sums.total[0] + 16 * u, acc[u]);
      }
    }
  }
};
#endif

template <class T>
struct StreamOf {
  using type = StreamVectors<T>;
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <>
struct StreamOf<BFloat16> {
  using type = StreamPairs;
};
#endif

template <class T, bool kTranspose>
class StreamTask {
  using Stream = typename StreamOf<T>::type;
  using A = typename Stream::A;
  static_assert(__is_same(typename Stream::Element, typename RowsOf<T>::type::Input),
                "both kinds of kernel read the same panel of x");

 public:
  explicit StreamTask(const MmTask& task) : task_(task) {}

  void run(int64_t edge) {
    const BlockSparseMmParams& p = task_.params;
    const bool gated = task_.epilogue.gate != nullptr;
    const int64_t out_edge = kTranspose ? p.v.bk : p.v.bn;
    add_edge(p.v, edge, out_edge, up_);
    if (gated) {
      add_edge(*task_.epilogue.gate, edge, out_edge, gate_);
    }
    const int64_t first_output = edge * out_edge;
    const Epilogue<T> epilogue(p, task_.epilogue, first_output,
                               min_of(out_edge, p.out_features() - first_output));
    epilogue.write(up_.total[0], gated ? gate_.total[0] : nullptr, kMaxEdge, 0, p.tokens);
  }

 private:
  void add_edge(const BlockSparseView& v, int64_t edge, int64_t out_edge, StreamSums<A>& sums) {
    const BlockSparseMmParams& p = task_.params;
    const auto* x = static_cast<const typename Stream::Element*>(p.x);
    const EdgeBlocks blocks(v, kTranspose, edge, task_.stray);
    for (int64_t t = 0; t < p.tokens; ++t) {
      if constexpr (kTranspose) {
        memset(sums.total[t], 0, sizeof sums.total[t]);
      } else {
        memset(sums.partial[t], 0, static_cast<size_t>(out_edge) * sizeof(Vector<A>));
      }
    }
    blocks.for_each([&](int64_t block, int64_t input) {
      if constexpr (kTranspose) {
        stream_.scale(v, block, x + input, p.x_stride, p.tokens, sums);
      } else {
        stream_.dot(v, block, x + input, p.x_stride, p.tokens, sums);
      }
    });
    if constexpr (kTranspose) {
      stream_.finish_scale(p.tokens, out_edge, sums);
    } else {
      fold(sums, p.tokens, out_edge);
    }
  }

  const MmTask& task_;
  Stream stream_;
  StreamSums<A> up_, gate_;
};

// Most tokens that mm_stream takes here; 0 where it cannot run at all.
int64_t mm_stream_tokens([[maybe_unused]] const BlockSparseMmParams& p) {
#if defined(__AVX512BF16__)
  if (p.v.dtype == DType::kBFloat16 && p.v.bk < 32) {
    return 0;
  }
#endif
  return kStreamTokens;
}

// Whether mm_stream can read x in place: it neither converts nor checks for the end of a row.
template <class T>
bool streams_in_place(const MmTask& task) {
  return __is_same(typename StreamOf<T>::type::Element, T) &&
         task.padded == task.params.in_features();
}

bool mm_stream_in_place(const MmTask& task) {
  return with_element_type(task.params.v.dtype,
                           [&](auto element) { return streams_in_place<decltype(element)>(task); });
}

// x as [tokens][padded] elements of the panel.
void mm_stream_pack(const MmTask& task, void* rows) {
  const BlockSparseMmParams& p = task.params;
  with_element_type(p.v.dtype, [&](auto element) {
    using T = decltype(element);
    using Element = typename StreamOf<T>::type::Element;
    const int64_t features = p.in_features();
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* in = static_cast<const T*>(p.x) + t * p.x_stride;
      Element* out = static_cast<Element*>(rows) + t * task.padded;
      if constexpr (__is_same(Element, T)) {
        memcpy(out, in, static_cast<size_t>(features) * sizeof(T));
      } else {
        for (int64_t f = 0; f < features; ++f) {
          out[f] = to_accumulator(in[f]);
        }
      }
      memset(out + features, 0, static_cast<size_t>(task.padded - features) * sizeof(Element));
    }
  });
}

void mm_stream(const MmTask& task, int64_t begin, int64_t end) {
  with_element_type(task.params.v.dtype, [&](auto element) {
    using T = decltype(element);
    auto run = [&](auto transpose) {
      StreamTask<T, decltype(transpose)::value> stream(task);
      for (int64_t edge = begin; edge < end; ++edge) {
        stream.run(edge);
      }
    };
    task.params.transpose ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
