// block_sparse_mm for one instruction set: a few tokens. A task is an output edge.
#pragma once

#include <optional>

#include "kernels/cpu/block_sparse_mm_impl.h"
#include "kernels/cpu/stream_tiles.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// Whether the tile registers take part: 2 to 16 tokens of bfloat16 and blocks of 32 or 64.
bool streams_tiles([[maybe_unused]] const BlockSparseMmParams& p) {
#if defined(__AMX_BF16__)
  auto fits = [](int64_t edge) { return edge == 32 || edge == 64; };
  return p.v.dtype == DType::kBFloat16 && p.tokens > 1 && p.tokens <= kStreamTokens &&
         fits(p.v.bk) && fits(p.v.bn);
#else
  return false;
#endif
}

template <class T, bool kTranspose>
class StreamTask {
  using Stream = typename StreamOf<T>::type;
  using A = typename Stream::A;
  static_assert(__is_same(typename Stream::Element, typename RowsOf<T>::type::Input),
                "both kinds of kernel read the same panel of x");

 public:
  explicit StreamTask(const MmTask& task) : task_(task) {
#if defined(__AMX_BF16__)
    if (streams_tiles(task.params)) {
      tiles_.emplace(kTranspose, task.params.tokens);
    }
#endif
  }

  void run(int64_t edge) {
    const BlockSparseMmParams& p = task_.params;
    const bool gated = task_.epilogue.gate != nullptr;
    const int64_t out_edge = kTranspose ? p.v.bk : p.v.bn;
    add_edge(p.v, edge, out_edge, up_);
    if (gated) {
      add_edge(*task_.epilogue.gate, edge, out_edge, gate_);
    }
    const int64_t first_output = edge * out_edge;
    const Epilogue<T> epilogue(p, task_.epilogue, task_.bypass, first_output,
                               min_of(out_edge, p.out_features() - first_output));
    epilogue.write(up_.total[0], gated ? gate_.total[0] : nullptr, kMaxEdge, 0, p.tokens);
  }

 private:
  void add_edge(const BlockSparseView& v, int64_t edge, int64_t out_edge, StreamSums<A>& sums) {
    const BlockSparseMmParams& p = task_.params;
    const auto* x = static_cast<const typename Stream::Element*>(p.x);
    const EdgeBlocks blocks(v, kTranspose, edge, task_.stray);
#if defined(__AMX_BF16__)
    if constexpr (__is_same(T, BFloat16)) {
      if (tiles_.has_value()) {
        tiles_->begin_edge();
        blocks.for_each([&](int64_t block, int64_t input) {
          tiles_->add(v, block, x + input * (kTranspose ? 1 : p.tokens), p.x_stride);
        });
        tiles_->end_edge(out_edge, sums);
        return;
      }
    }
#endif
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
#if defined(__AMX_BF16__)
  std::optional<StreamTiles> tiles_;
#endif
  StreamSums<A> up_, gate_;
};

// Most tokens that mm_stream takes here; 0 where it cannot run at all.
int64_t mm_stream_tokens([[maybe_unused]] const BlockSparseMmParams& p) {
#if defined(__AVX512BF16__)
  if (p.v.dtype == DType::kBFloat16 && p.v.bk < 32) {
    return 0;
  }
#endif
  return streams_tiles(p) ? kStreamTokens : kVectorTokens;
}

// Whether mm_stream can read x in place: it neither converts nor checks for the end of a row.
template <class T>
bool streams_in_place(const MmTask& task) {
  return __is_same(typename StreamOf<T>::type::Element, T) &&
         task.padded == task.params.in_features() &&
         (task.params.transpose || !streams_tiles(task.params));
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
#if defined(__AMX_BF16__)
    if constexpr (__is_same(T, BFloat16)) {
      if (!p.transpose && streams_tiles(p)) {
        return StreamTiles::pack(static_cast<const T*>(p.x), p.x_stride, p.tokens, features,
                                 task.padded, static_cast<T*>(rows));
      }
    }
#endif
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
