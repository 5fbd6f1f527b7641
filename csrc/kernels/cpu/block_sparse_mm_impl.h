// block_sparse_mm for one instruction set (the including file sets FIPS_ISA and the compiler
// flags).
//
// Prefill (mm_pack, mm_tiled). Tokens are the vector dimension: x is packed to
// [tile][feature][kTokens], and a stored block multiplies a token tile with one broadcast per
// weight. Weights are therefore read in any order, which is why one copy of the values serves both
// directions:
//   forward     out[j] += V[k, j] x[k]   output edge j of bn, reduced over k of bk
//   transposed  out[k] += V[k, j] x[j]   output edge k of bk, reduced over j of bn
//
// Decode (mm_stream). Too few tokens to fill vectors: k, contiguous in a block, is the vector
// dimension.
#pragma once

#include "kernels/cpu/block_tile.h"
#include "kernels/cpu/dispatch.h"

namespace fips::cpu::FIPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kOutputs = 8, kVectors = 2;  // 16 accumulators of 32 registers
#else
constexpr int64_t kOutputs = 4, kVectors = 2;  // 8 accumulators of 16 registers
#endif
template <class A>
constexpr int64_t kTokens = kVectors * kLanes<A>;
static_assert(kTokens<float> <= 32, "kMaxTokenTile of block_sparse_mm.cpp sizes the workspace");

constexpr int64_t kMaxTilesPerTask = 4;

// The stored blocks that contribute to one output edge (a block column, or a block row when
// transposed).
struct OutputBlocks {
  const int32_t* ptr;
  const int32_t* input;  // input block of the i-th entry
  const int32_t* id;     // stored block of the i-th entry; null: i itself
  int64_t out_edge, in_edge, out_features, in_features;

  explicit OutputBlocks(const BlockSparseMmParams& p)
      : ptr(p.transpose ? p.v.row_ptr : p.v.col_ptr),
        input(p.transpose ? p.v.col_idx : p.v.row_idx),
        id(p.transpose ? p.v.block_id : nullptr),
        out_edge(p.transpose ? p.v.bk : p.v.bn),
        in_edge(p.transpose ? p.v.bn : p.v.bk),
        out_features(p.out_features()),
        in_features(p.in_features()) {}

  int64_t block(int64_t i) const { return id == nullptr ? i : id[i]; }
};

FIPS_INLINE int64_t padded_inputs(const BlockSparseMmParams& p) {
  return round_up(p.in_features(), p.transpose ? p.v.bn : p.v.bk);
}

// Token tiles [begin, end) of x as [tile][padded feature][kTokens], zero past the ragged edges.
template <class T>
void pack_tiles(const BlockSparseMmParams& p, Accumulator<T>* packed, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t features = p.in_features(), padded = padded_inputs(p);
  for (int64_t tile = begin; tile < end; ++tile) {
    A* out = packed + tile * padded * kTokens<A>;
    const int64_t first = tile * kTokens<A>;
    const int64_t count = min_of(kTokens<A>, p.tokens - first);
    memset(out, 0, static_cast<size_t>(padded * kTokens<A>) * sizeof(A));
    for (int64_t t = 0; t < count; ++t) {
      const T* row = static_cast<const T*>(p.x) + (first + t) * p.x_stride;
      for (int64_t f = 0; f < features; ++f) {
        out[f * kTokens<A> + t] = to_accumulator(row[f]);
      }
    }
  }
}

// sums[o][token] += sum over e of tile(o, e) * x[e][token] for every output o of the block.
template <class A, bool kTranspose>
FIPS_INLINE void multiply_block(const A* tile, const A* x, A* sums, int64_t out_edge,
                                int64_t in_edge, int64_t bk) {
  const int64_t out_step = kTranspose ? 1 : bk, in_step = kTranspose ? bk : 1;
  for (int64_t o = 0; o < out_edge; o += kOutputs) {
    A* sum = sums + o * kTokens<A>;
    Vector<A> acc[kOutputs][kVectors];
    for (int64_t i = 0; i < kOutputs; ++i) {
      for (int64_t u = 0; u < kVectors; ++u) {
        acc[i][u] = load(sum + i * kTokens<A> + u * kLanes<A>);
      }
    }
    const A* weights = tile + o * out_step;
    for (int64_t e = 0; e < in_edge; ++e) {
      Vector<A> in[kVectors];
      for (int64_t u = 0; u < kVectors; ++u) {
        in[u] = load(x + e * kTokens<A> + u * kLanes<A>);
      }
      for (int64_t i = 0; i < kOutputs; ++i) {
        const A weight = weights[i * out_step + e * in_step];
        for (int64_t u = 0; u < kVectors; ++u) {
          acc[i][u] += weight * in[u];
        }
      }
    }
    for (int64_t i = 0; i < kOutputs; ++i) {
      for (int64_t u = 0; u < kVectors; ++u) {
        store<A>(sum + i * kTokens<A> + u * kLanes<A>, acc[i][u]);
      }
    }
  }
}

template <class T>
FIPS_INLINE void write_tile(const BlockSparseMmParams& p, const Accumulator<T>* sums,
                            int64_t first_token, int64_t first_output, int64_t outputs) {
  using A = Accumulator<T>;
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t count = min_of(kTokens<A>, p.tokens - first_token);
  for (int64_t t = 0; t < count; ++t) {
    T* out = static_cast<T*>(p.out) + (first_token + t) * p.out_stride + first_output;
    for (int64_t o = 0; o < outputs; ++o) {
      const A offset = bias == nullptr ? A(0) : to_accumulator(bias[first_output + o]);
      out[o] = FromAccumulator<T>::convert(sums[o * kTokens<A> + t] + offset);
    }
  }
}

int64_t mm_token_tile(DType dtype) {
  return dtype == DType::kFloat64 ? kTokens<double> : kTokens<float>;
}

// A stored block is expanded once per task, so a task takes as many token tiles as keep its packed
// x within half of a common L2 cache.
int64_t mm_tiles_per_task(const BlockSparseMmParams& p) {
  const int64_t size = p.v.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t tile_bytes = padded_inputs(p) * mm_token_tile(p.v.dtype) * size;
  return max_of(1, min_of(kMaxTilesPerTask, (int64_t{512} << 10) / max_of(1, tile_bytes)));
}

// A task is (group of token tiles, output edge), output edges innermost.
template <class T, bool kTranspose>
void multiply_tasks(const BlockSparseMmParams& p, const Accumulator<T>* packed, int64_t begin,
                    int64_t end) {
  using A = Accumulator<T>;
  const OutputBlocks blocks(p);
  const int64_t edges = ceil_div(blocks.out_features, blocks.out_edge);
  const int64_t padded = padded_inputs(p), tiles = ceil_div(p.tokens, kTokens<A>);
  const int64_t group = mm_tiles_per_task(p);
  alignas(64) A scratch[kMaxEdge * kMaxEdge];
  alignas(64) A sums[kMaxTilesPerTask][kMaxEdge * kTokens<A>];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t edge = task % edges, first_tile = task / edges * group;
    const int64_t count = min_of(group, tiles - first_tile);
    for (int64_t i = 0; i < count; ++i) {
      memset(sums[i], 0, static_cast<size_t>(blocks.out_edge * kTokens<A>) * sizeof(A));
    }
    for (int64_t i = blocks.ptr[edge]; i < blocks.ptr[edge + 1]; ++i) {
      const A* tile = load_tile<T>(p.v, blocks.block(i), scratch);
      const A* x = packed + (first_tile * padded + blocks.input[i] * blocks.in_edge) * kTokens<A>;
      for (int64_t n = 0; n < count; ++n) {
        multiply_block<A, kTranspose>(tile, x + n * padded * kTokens<A>, sums[n], blocks.out_edge,
                                      blocks.in_edge, p.v.bk);
      }
    }
    const int64_t first_output = edge * blocks.out_edge;
    for (int64_t n = 0; n < count; ++n) {
      write_tile<T>(p, sums[n], (first_tile + n) * kTokens<A>, first_output,
                    min_of(blocks.out_edge, blocks.out_features - first_output));
    }
  }
}

// Output edges [begin, end) for at most kStreamTokens tokens; `rows` is x as [token][padded
// feature].
template <class T>
void stream_forward(const BlockSparseMmParams& p, const Accumulator<T>* rows, int64_t begin,
                    int64_t end) {
  using A = Accumulator<T>;
  const OutputBlocks blocks(p);
  const int64_t padded = padded_inputs(p);
  const T* bias = static_cast<const T*>(p.bias);
  alignas(64) A scratch[kMaxEdge * kMaxEdge];
  Vector<A> sums[kStreamTokens][kMaxEdge];
  for (int64_t edge = begin; edge < end; ++edge) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      memset(sums[t], 0, static_cast<size_t>(blocks.out_edge) * sizeof(Vector<A>));
    }
    for (int64_t i = blocks.ptr[edge]; i < blocks.ptr[edge + 1]; ++i) {
      const A* tile = load_tile<T>(p.v, blocks.block(i), scratch);
      for (int64_t t = 0; t < p.tokens; ++t) {
        const A* x = rows + t * padded + blocks.input[i] * blocks.in_edge;
        for (int64_t o = 0; o < blocks.out_edge; ++o) {
          Vector<A> sum = sums[t][o];
          for (int64_t k = 0; k < p.v.bk; k += kLanes<A>) {
            sum += load(tile + o * p.v.bk + k) * load(x + k);
          }
          sums[t][o] = sum;
        }
      }
    }
    const int64_t first = edge * blocks.out_edge;
    const int64_t count = min_of(blocks.out_edge, blocks.out_features - first);
    for (int64_t t = 0; t < p.tokens; ++t) {
      T* out = static_cast<T*>(p.out) + t * p.out_stride + first;
      for (int64_t o = 0; o < count; ++o) {
        const A offset = bias == nullptr ? A(0) : to_accumulator(bias[first + o]);
        out[o] = FromAccumulator<T>::convert(horizontal_sum<A>(sums[t][o]) + offset);
      }
    }
  }
}

template <class T>
void stream_transposed(const BlockSparseMmParams& p, const Accumulator<T>* rows, int64_t begin,
                       int64_t end) {
  using A = Accumulator<T>;
  const OutputBlocks blocks(p);
  const int64_t padded = padded_inputs(p);
  const T* bias = static_cast<const T*>(p.bias);
  alignas(64) A scratch[kMaxEdge * kMaxEdge];
  alignas(64) A sums[kStreamTokens][kMaxEdge];
  for (int64_t edge = begin; edge < end; ++edge) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      memset(sums[t], 0, static_cast<size_t>(blocks.out_edge) * sizeof(A));
    }
    for (int64_t i = blocks.ptr[edge]; i < blocks.ptr[edge + 1]; ++i) {
      const A* tile = load_tile<T>(p.v, blocks.block(i), scratch);
      for (int64_t t = 0; t < p.tokens; ++t) {
        const A* x = rows + t * padded + blocks.input[i] * blocks.in_edge;
        for (int64_t k = 0; k < p.v.bk; k += kLanes<A>) {
          Vector<A> sum = load(sums[t] + k);
          for (int64_t j = 0; j < blocks.in_edge; ++j) {
            sum += x[j] * load(tile + j * p.v.bk + k);
          }
          store<A>(sums[t] + k, sum);
        }
      }
    }
    const int64_t first = edge * blocks.out_edge;
    const int64_t count = min_of(blocks.out_edge, blocks.out_features - first);
    for (int64_t t = 0; t < p.tokens; ++t) {
      T* out = static_cast<T*>(p.out) + t * p.out_stride + first;
      for (int64_t o = 0; o < count; ++o) {
        const A offset = bias == nullptr ? A(0) : to_accumulator(bias[first + o]);
        out[o] = FromAccumulator<T>::convert(sums[t][o] + offset);
      }
    }
  }
}

template <class F>
FIPS_INLINE void with_element_type(DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Half{});
  }
}

void mm_pack(const BlockSparseMmParams& p, void* packed, int64_t begin, int64_t end) {
  with_element_type(p.v.dtype, [&](auto element) {
    using T = decltype(element);
    pack_tiles<T>(p, static_cast<Accumulator<T>*>(packed), begin, end);
  });
}

void mm_tiled(const BlockSparseMmParams& p, const void* packed, int64_t begin, int64_t end) {
  with_element_type(p.v.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* x = static_cast<const Accumulator<T>*>(packed);
    p.transpose ? multiply_tasks<T, true>(p, x, begin, end)
                : multiply_tasks<T, false>(p, x, begin, end);
  });
}

void mm_stream(const BlockSparseMmParams& p, const void* rows, int64_t begin, int64_t end) {
  with_element_type(p.v.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* x = static_cast<const Accumulator<T>*>(rows);
    p.transpose ? stream_transposed<T>(p, x, begin, end) : stream_forward<T>(p, x, begin, end);
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
