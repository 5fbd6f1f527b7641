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
  return p.v.dtype == DType::kBFloat16 && p.tokens > 1 && p.tokens <= kFewTokens && fits(p.v.bk) &&
         fits(p.v.bn);
#else
  return false;
#endif
}

template <class L, bool kTranspose>
class StreamTask {
  using T = typename L::Stored;
  using A = Accumulator<T>;
  using Element = typename L::Element;

 public:
  explicit StreamTask(const MmTask& task) : task_(task), few_(task.params.tokens) {
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
    const auto* x = static_cast<const Element*>(p.x);
    const EdgeBlocks blocks(v, kTranspose, edge, task_.stray);
#if defined(__AMX_BF16__)
    if constexpr (__is_same(Element, BFloat16)) {
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
    memset(sums.total, 0, static_cast<size_t>(p.tokens) * sizeof sums.total[0]);
    if (p.tokens == 1) {
      if constexpr (!kTranspose) {
        one_.begin_dots(out_edge);
      }
      blocks.for_each([&](int64_t block, int64_t input) {
        kTranspose ? one_.add_scales(v, block, x + input, sums.total[0])
                   : one_.add_dots(v, block, x + input);
      });
      if constexpr (!kTranspose) {
        one_.end_dots(out_edge, sums.total[0]);
      }
    } else {
      blocks.for_each([&](int64_t block, int64_t input) {
        kTranspose ? few_.add_scales(v, block, x + input, p.x_stride, sums)
                   : few_.add_dots(v, block, x + input, p.x_stride, sums);
      });
      if constexpr (!kTranspose) {
        few_.end_dots(v, p.x_stride, sums);
      }
    }
    for (int64_t t = 0; kTranspose && t < p.tokens; ++t) {
      L::finish_outputs(sums.total[t], out_edge);
    }
  }

  const MmTask& task_;
  OneToken<L> one_;
  FewTokens<L> few_;
#if defined(__AMX_BF16__)
  std::optional<StreamTiles> tiles_;
#endif
  StreamSums<A> up_, gate_;
};

// The lanes of a product: calls body(them).
template <class F>
FIPS_INLINE auto with_stream_lanes(const BlockSparseView& v, F&& body) {
  return with_element_type(v.dtype, [&](auto element) __attribute__((always_inline)) {
    return with_lanes<decltype(element)>(v.bk, body);
  });
}

// Most tokens that mm_stream takes here.
int64_t mm_stream_tokens(const BlockSparseMmParams& p) {
  return streams_tiles(p) ? kFewTokens : kVectorTokens;
}

// Bytes of an element of x as mm_stream_pack lays it out; 0 where mm_stream reads x in place, since
// it neither converts nor checks for the end of a row.
int64_t mm_stream_element(const MmTask& task) {
  const BlockSparseMmParams& p = task.params;
  return with_stream_lanes(p.v, [&](auto lanes) -> int64_t {
    using L = decltype(lanes);
    const bool in_place = __is_same(typename L::Element, typename L::Stored) &&
                          task.padded == p.in_features() && (p.transpose || !streams_tiles(p));
    return in_place ? 0 : sizeof(typename L::Element);
  });
}

// x as [tokens][padded].
void mm_stream_pack(const MmTask& task, void* rows) {
  const BlockSparseMmParams& p = task.params;
  with_stream_lanes(p.v, [&](auto lanes) {
    using T = typename decltype(lanes)::Stored;
    using Element = typename decltype(lanes)::Element;
    const int64_t features = p.in_features();
#if defined(__AMX_BF16__)
    if constexpr (__is_same(Element, BFloat16)) {
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
  with_stream_lanes(task.params.v, [&](auto lanes) {
    auto run = [&](auto transpose) {
      StreamTask<decltype(lanes), decltype(transpose)::value> stream(task);
      for (int64_t edge = begin; edge < end; ++edge) {
        stream.run(edge);
      }
    };
    task.params.transpose ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
