// The building block of the kernels that keep activations in shared memory: one warp multiplies
// sixteen outputs ("a strip") by a tile of tokens, with no barrier and no shared memory for the
// weights.
//
// Weights are the 16-row operand of mma.sync and go from global memory straight to registers, 8
// bytes a lane and row; each value is used for kStripTokens tokens. Tokens are the columns and come
// from shared memory, 8 bytes a lane. Both orders of an instruction, its 16 rows and its 16
// reduction positions, are permuted to make these 8 bytes contiguous in memory:
//   row i of the instruction        output   4 (i % 8 / 2) + i % 2 + 2 (i / 8)
//   reduction position i            memory   the same map
// so a lane also ends with four consecutive outputs of one token (Quad).
//
// Per 16 x 16 weights and 8 tokens a warp reads 256 bytes of shared memory, 2 of its cycles, for
// one instruction of 2048 multiply-adds: 1024 a cycle and multiprocessor, near what mma.sync
// reaches.
#pragma once

#include "kernels/cuda/common.cuh"

namespace fips::cuda {

inline constexpr int kStripOutputs = 16;
inline constexpr int kStripTokens = 64;

// The output (or reduction position) behind row (position) `i` of an instruction.
FIPS_INLINE FIPS_HOST_DEVICE constexpr int strip_order(int i) {
  return 4 * (i % 8 / 2) + i % 2 + 2 * (i / 8);
}

// Activations of some tokens in shared memory, [tokens][features], features contiguous. The stride
// is 32 bytes past a multiple of 128, so that the lanes of a read (4 tokens x 32 bytes) fall into
// different banks.
template <class T>
struct TokenTile {
  static constexpr int stride_of(int features) {
    return (features * static_cast<int>(sizeof(T)) + 127) / 128 * 128 + 32;
  }

  unsigned char* shared;
  int stride;  // bytes between tokens

  FIPS_DEVICE_MEMBER T* at(int token, int feature) const {
    return reinterpret_cast<T*>(shared + token * stride) + feature;
  }
};

// Eight bytes: four elements.
template <class T>
struct alignas(8) Quad {
  T element[4];
};

struct alignas(8) Words {
  uint32_t word[2];
};

// 16 x 16 weights as the A operand.
struct WeightFragment {
  uint32_t a[4];
};

// From memory [output][reduction], rows `stride` elements apart.
template <class T>
FIPS_DEVICE WeightFragment load_rows(const T* tile, int64_t stride) {
  const int lane = lane_index(), row = strip_order(lane / 4), column = lane % 4 * 4;
  const T* first = tile + row * stride + column;
  const Words upper = *reinterpret_cast<const Words*>(first);
  const Words lower = *reinterpret_cast<const Words*>(first + 2 * stride);
  return {{upper.word[0], lower.word[0], upper.word[1], lower.word[1]}};
}

// From memory [reduction][output]: what load_rows gives is the transpose, quarter by quarter.
template <class T>
FIPS_DEVICE WeightFragment transpose(const WeightFragment& loaded) {
  return {{movmatrix_transposed(loaded.a[0]), movmatrix_transposed(loaded.a[2]),
           movmatrix_transposed(loaded.a[1]), movmatrix_transposed(loaded.a[3])}};
}

// Sums of one strip for kStripTokens tokens.
struct StripSums {
  float value[kStripTokens / 8][4];
};

// sums += weights * the reduction positions of `tile` from `feature` on, for the tokens from
// `token` on.
template <class T>
FIPS_DEVICE void multiply_strip(StripSums& sums, const WeightFragment& weights,
                                const TokenTile<T>& tile, int token, int feature) {
  const int lane = lane_index();
  const T* x = tile.at(token + lane / 4, feature + lane % 4 * 4);
  FIPS_UNROLL
  for (int i = 0; i < kStripTokens / 8; ++i) {
    const Words b = *reinterpret_cast<const Words*>(x);
    mma_m16n8k16<T>(sums.value[i], weights.a, b.word[0], b.word[1]);
    x = reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(x) + 8 * tile.stride);
  }
}

// Sixteen reduction positions of a strip.
template <class T>
struct StripStep {
  const T* weights;  // null: nothing to add
  int feature;       // of the tile that the weights multiply
};

// Adds `steps` steps, of which locate(i) tells where they are, the same in every lane. Loads run
// kAhead steps ahead of the arithmetic, which covers most of the time L2 takes to answer.
template <class T, bool kTransposed, class Locate>
FIPS_DEVICE void reduce_strip(StripSums& sums, int steps, int64_t weight_stride,
                              const TokenTile<T>& tile, int token, const Locate& locate) {
  constexpr int kAhead = 3;
  WeightFragment weights[kAhead];
  int feature[kAhead];  // -1: nothing to add
  const auto load = [&](int slot, int i) {
    const StripStep<T> step = i < steps ? locate(i) : StripStep<T>{nullptr, 0};
    feature[slot] = step.weights == nullptr ? -1 : step.feature;
    weights[slot] =
        step.weights == nullptr ? WeightFragment{} : load_rows(step.weights, weight_stride);
  };
  FIPS_UNROLL
  for (int slot = 0; slot < kAhead; ++slot) {
    load(slot, slot);
  }
  FIPS_UNROLL_BY(1)
  for (int first = 0; first < steps; first += kAhead) {
    FIPS_UNROLL
    for (int slot = 0; slot < kAhead; ++slot) {
      const WeightFragment current = kTransposed ? transpose<T>(weights[slot]) : weights[slot];
      const int at = feature[slot];
      load(slot, first + slot + kAhead);
      if (at >= 0) {
        multiply_strip(sums, current, tile, token, at);
      }
    }
  }
}

// What a lane holds of a finished strip: for each i, four consecutive outputs, from 4 (lane / 8)
// on, of token 8 i + quad_token().
FIPS_DEVICE int quad_token() { return lane_index() % 4 * 2 + lane_index() / 4 % 2; }
FIPS_DEVICE int quad_output() { return lane_index() / 8 * 4; }

// Rounds and exchanges with the neighbouring lane: it holds the odd outputs of the same tokens.
template <class T>
FIPS_DEVICE Quad<T> exchange_quad(const float (&sum)[4]) {
  const bool odd = lane_index() / 4 % 2 != 0;
  const Pair<T> even_token{{from_float<T>(sum[0]), from_float<T>(sum[2])}};
  const Pair<T> odd_token{{from_float<T>(sum[1]), from_float<T>(sum[3])}};
  const Pair<T> kept = odd ? odd_token : even_token, sent = odd ? even_token : odd_token;
  const uint32_t word = shuffle(
      uint32_t{sent.element[0].bits} | uint32_t{sent.element[1].bits} << 16, lane_index() ^ 4);
  const T first{static_cast<uint16_t>(word)}, second{static_cast<uint16_t>(word >> 16)};
  return odd ? Quad<T>{{first, kept.element[0], second, kept.element[1]}}
             : Quad<T>{{kept.element[0], first, kept.element[1], second}};
}

// Tokens [first, first + tile) of a tensor with `end` tokens.
struct TokenRange {
  int64_t first, end;
};

// Rows of x into the tile, zeros for tokens past the end; `width` is a multiple of a chunk. The
// copies are under way on return.
template <class T, int kTokens, int kThreads>
FIPS_DEVICE void load_token_tile(const T* x, int64_t stride, const TokenRange& tokens, int width,
                                 const TokenTile<T>& tile) {
  const int chunks = width / Chunk<T>::kSize;
  for (int item = thread_index(); item < kTokens * chunks; item += kThreads) {
    const int row = item / chunks, feature = item % chunks * Chunk<T>::kSize;
    const int64_t token = tokens.first + row;
    const bool inside = token < tokens.end;
    cp_async_16(shared_address(tile.at(row, feature)), inside ? x + token * stride + feature : x,
                inside ? kChunkBytes : 0);
  }
  cp_async_commit();
}

// Stores a strip to rows of `out` from token `tokens.first` on; features from `limit` on are not
// stored. Rows are aligned to 8 bytes.
template <class T>
FIPS_DEVICE void store_strip_rows(const StripSums& sums, T* out, int64_t stride,
                                  const TokenRange& tokens, int feature, int64_t limit) {
  FIPS_UNROLL
  for (int i = 0; i < kStripTokens / 8; ++i) {
    const Quad<T> quad = exchange_quad<T>(sums.value[i]);
    const int64_t token = tokens.first + 8 * i + quad_token();
    if (token >= tokens.end) {
      continue;
    }
    const int first = feature + quad_output();
    T* target = out + token * stride + first;
    if (first + 4 <= limit) {
      *reinterpret_cast<Quad<T>*>(target) = quad;
      continue;
    }
    FIPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (first + j < limit) {
        target[j] = quad.element[j];
      }
    }
  }
}

}  // namespace fips::cuda
