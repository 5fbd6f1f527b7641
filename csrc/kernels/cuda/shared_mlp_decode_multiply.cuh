// Arithmetic of shared_mlp_decode: one warp multiplies a step of weights with the features of 8 or
// 16 tokens. 16-bit elements: tensor cores, the weights as the 16-row operand. float32: scalar
// multiply-adds.
#pragma once

#include "kernels/cuda/shared_mlp_decode_stream.cuh"

namespace fips::cuda {

// ---- features
// ------------------------------------------------------------------------------------

// This lane's 16-byte chunks of a step's features [kTokens][up to 8 chunks], held in registers
// while the step before is multiplied.
template <class T, int kTokens>
struct StepFeatures {
  static constexpr int kParts = kTokens * 8 / kWarpSize;
  Chunk<T> part[kParts];
};

// {token, chunk} of a lane's part: as the B operand wants them (shared_mlp_decode_layout.h), span
// by span, for 16-bit elements; row by row for float32.
template <class T, int kTokens>
FIPS_DEVICE Coord feature_place(int lane, int part) {
  if constexpr (sizeof(T) == 2) {
    return {part % (kTokens / 8) * 8 + lane / 4, part / (kTokens / 8) * 4 + lane % 4};
  } else {
    return {part * 4 + lane / 8, lane % 8};
  }
}

// The first `count` elements of a chunk, the rest zeros, from memory of any alignment; a rolled
// loop, since features are hardly ever read this way.
template <class T>
FIPS_DEVICE Chunk<T> load_chunk_slowly(const T* source, int count) {
  constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
  uint32_t words[4] = {0, 0, 0, 0};
  FIPS_UNROLL_BY(1)
  for (int i = 0; i < count; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, source + i, sizeof(T));
    bits <<= i % kInWord * 16;
    FIPS_UNROLL
    for (int word = 0; word < 4; ++word) {
      words[word] |= i / kInWord == word ? bits : 0;
    }
  }
  Chunk<T> chunk;
  memcpy(&chunk, words, sizeof chunk);
  return chunk;
}

// Tokens past the last one, positions without a stored block and features past the edge are zeros.
template <class T, int kTokens>
FIPS_DEVICE void load_features(const DecodeTask& task, const StepMeta& meta,
                               StepFeatures<T, kTokens>& features) {
  constexpr int kChunk = DecodeStep<T>::kChunk, kGroupChunks = DecodeStep<T>::kGroupChunks;
  const DecodeFeatures& source = task.features[meta.stage];
  const T* data = static_cast<const T*>(source.data);
  FIPS_UNROLL
  for (int i = 0; i < StepFeatures<T, kTokens>::kParts; ++i) {
    const Coord at = feature_place<T, kTokens>(lane_index(), i);
    const int group_feature = meta.feature[at.col / kGroupChunks];
    const int feature = group_feature + at.col % kGroupChunks * kChunk;
    const bool any = at.row < task.tokens && group_feature >= 0;
    const int count = any ? elements_below(feature, source.count, kChunk) : 0;
    const T* from = data + at.row * source.stride + feature;
    features.part[i] = Chunk<T>{};
    if (count == kChunk && source.wide) {
      features.part[i] = *reinterpret_cast<const Chunk<T>*>(from);
    } else if (count > 0) {
      features.part[i] = load_chunk_slowly(from, count);
    }
  }
}

// ---- sums
// ----------------------------------------------------------------------------------------

// Sums of one unit in shared memory, [matrix][slot][kTokens][out_tile + 4] float32: every warp's
// part of the reduction, or with 16 tokens that of two warps, to save room. The padding keeps an
// accumulator's outputs and token pairs in different banks.
template <int kTokens>
struct DecodeSums {
  static constexpr int kSlots = kTokens == 8 ? kDecodeWarps : kDecodeWarps / 2;
  // Two matrices of 32 outputs, or one of 64.
  static constexpr int kBytes = 2 * (kRowStepOut + 4) * kSlots * kTokens * 4;
  float* shared;
  int stride;

  FIPS_DEVICE_MEMBER float& at(int matrix, int slot, int token, int out) const {
    return shared[((matrix * kSlots + slot) * kTokens + token) * stride + out];
  }

  FIPS_DEVICE_MEMBER float total(int matrix, int token, int out) const {
    float sum = 0;
    FIPS_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      sum += at(matrix, slot, token, out);
    }
    return sum;
  }

  // Brings the sums of all warps together, `each` calling its argument with (token, out, sum).
  // All threads of the block; the caller puts a barrier behind it.
  template <class Each>
  FIPS_DEVICE_MEMBER void collect(int matrix, const Each& each) const {
    const int warp = warp_index();
    if (warp >= kDecodeWarps - kSlots) {
      each([&](int token, int out, float sum) { at(matrix, warp % kSlots, token, out) = sum; });
    }
    if constexpr (kSlots < kDecodeWarps) {
      block_barrier();
      if (warp < kSlots) {
        each([&](int token, int out, float sum) { at(matrix, warp, token, out) += sum; });
      }
    }
  }
};

// ---- 16-bit elements
// -----------------------------------------------------------------------------

struct alignas(kChunkBytes) Words {
  uint32_t word[4];
};

template <class T>
FIPS_DEVICE uint32_t word_of(const Chunk<T>& chunk, int i) {
  return uint32_t{chunk.element[2 * i].bits} | uint32_t{chunk.element[2 * i + 1].bits} << 16;
}

// A fragments of 16 outputs from `out` on, for both instructions of span `span`.
FIPS_DEVICE void load_row_fragments(const unsigned char* step, int out, int span,
                                    uint32_t (&a)[2][4]) {
  const int row = out + lane_index() / 4, chunk = span * 4 + lane_index() % 4;
  const Words low = *reinterpret_cast<const Words*>(step + row_step_offset(row, chunk));
  const Words high = *reinterpret_cast<const Words*>(step + row_step_offset(row + 8, chunk));
  FIPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    a[i][0] = low.word[2 * i];
    a[i][1] = high.word[2 * i];
    a[i][2] = low.word[2 * i + 1];
    a[i][3] = high.word[2 * i + 1];
  }
}

FIPS_DEVICE void load_column_fragments(const unsigned char* step, int out, int chunks_shift,
                                       uint32_t (&a)[2][4]) {
  FIPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Coord at = column_step_row(lane_index(), i);
    const int offset = column_step_offset(at.row, out / 8 + at.col, chunks_shift);
    ldmatrix_x4_transposed(a[i], shared_address(step + offset));
  }
}

// A lane's sums of one step after another, as accumulators of 16 outputs x 8 tokens.
template <class T, int kTokens>
struct WarpSums {
  static constexpr int kTokenTiles = kTokens / 8;
  float value[4][kTokenTiles][4];

  FIPS_DEVICE_MEMBER void add_step(bool columns, int out_tile, const unsigned char* step,
                                   const StepFeatures<T, kTokens>& x, unsigned char*) {
    if (columns) {
      const int chunks_shift = column_chunks_shift<T>(out_tile);
      FIPS_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        if (tile * 16 < out_tile) {
          uint32_t a[2][4];
          load_column_fragments(step, tile * 16, chunks_shift, a);
          multiply(tile, a, x, 0);
        }
      }
    } else {
      FIPS_UNROLL
      for (int tile = 0; tile < kRowStepOut / 16; ++tile) {
        if (tile * 16 < out_tile) {
          FIPS_UNROLL
          for (int span = 0; span < 2; ++span) {
            uint32_t a[2][4];
            load_row_fragments(step, tile * 16, span, a);
            multiply(tile, a, x, span);
          }
        }
      }
    }
  }

  // Calls store(token, out, sum).
  template <class Store>
  FIPS_DEVICE_MEMBER void each(int out_tile, const Store& store) const {
    FIPS_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      if (tile * 16 < out_tile) {
        FIPS_UNROLL
        for (int i = 0; i < kTokenTiles * 4; ++i) {
          const Coord at = accumulator_coord(lane_index(), i % 4);
          store(i / 4 * 8 + at.col, tile * 16 + at.row, value[tile][i / 4][i % 4]);
        }
      }
    }
  }

 private:
  FIPS_DEVICE_MEMBER void multiply(int tile, const uint32_t (&a)[2][4],
                                   const StepFeatures<T, kTokens>& x, int span) {
    FIPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      FIPS_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        const Chunk<T>& b = x.part[span * kTokenTiles + t];
        mma_m16n8k16<T>(value[tile][t], a[i], word_of(b, 2 * i), word_of(b, 2 * i + 1));
      }
    }
  }
};

// ---- float32
// -------------------------------------------------------------------------------------

// The step's features [kTokens][32] in shared memory, of one warp.
template <int kTokens>
inline constexpr int kFloatFeatureBytes = kTokens * kStageBytes;

// A lane sums one output for all tokens; with 16 outputs to a tile, its half of the lanes takes
// every other chunk of the reduction.
template <int kTokens>
struct WarpSums<float, kTokens> {
  float value[kTokens];

  FIPS_DEVICE_MEMBER void add_step(bool columns, int out_tile, const unsigned char* step,
                                   const StepFeatures<float, kTokens>& x, unsigned char* scratch) {
    FIPS_UNROLL
    for (int i = 0; i < StepFeatures<float, kTokens>::kParts; ++i) {
      const Coord at = feature_place<float, kTokens>(lane_index(), i);
      *reinterpret_cast<Chunk<float>*>(scratch + at.row * kStageBytes + at.col * kChunkBytes) =
          x.part[i];
    }
    warp_barrier();
    const int out = lane_index() & (out_tile - 1);
    const int stride = kWarpSize / out_tile;
    const int chunks_shift = column_chunks_shift<float>(out_tile);
    FIPS_UNROLL_BY(2)
    for (int chunk = lane_index() / out_tile; chunk < 8; chunk += stride) {
      const Chunk<float> w =
          columns ? column_chunk(step, out, chunk, chunks_shift)
                  : *reinterpret_cast<const Chunk<float>*>(step + row_step_offset(out, chunk));
      FIPS_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Chunk<float> token =
            *reinterpret_cast<const Chunk<float>*>(scratch + t * kStageBytes + chunk * kChunkBytes);
        FIPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          value[t] += w.element[r] * token.element[r];
        }
      }
    }
  }

  template <class Store>
  FIPS_DEVICE_MEMBER void each(int out_tile, const Store& store) const {
    const int lane = lane_index();
    FIPS_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      uint32_t bits;
      memcpy(&bits, &value[t], sizeof bits);
      bits = shuffle(bits, lane ^ 16);
      float other;
      memcpy(&other, &bits, sizeof other);
      if (lane < out_tile) {
        store(t, lane, out_tile == 16 ? value[t] + other : value[t]);
      }
    }
  }

 private:
  // Four positions of one output.
  FIPS_DEVICE_MEMBER static Chunk<float> column_chunk(const unsigned char* step, int out, int chunk,
                                                      int chunks_shift) {
    Chunk<float> w;
    FIPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int offset = column_step_offset(chunk * 4 + i, out / 4, chunks_shift);
      w.element[i] = *reinterpret_cast<const float*>(step + offset + out % 4 * 4);
    }
    return w;
  }
};

}  // namespace fips::cuda
