// Arithmetic of shared_mlp_decode: one warp multiplies a tile step (16 outputs) with the features
// of 8 or 16 tokens. 16-bit elements: tensor cores, the weights as the 16-row operand. float32:
// scalar multiply-adds.
#pragma once

#include "kernels/cuda/shared_mlp_decode_stream.cuh"

namespace fips::cuda {

// ---- features
// ------------------------------------------------------------------------------------

// This lane's 16-byte chunks of a step's features [kTokens][8 chunks], held in registers while the
// step before is multiplied.
template <class T, int kTokens>
struct StepFeatures {
  static constexpr int kParts = kTokens * 8 / kWarpSize;
  Chunk<T> part[kParts];
};

// {token, chunk} of a lane's part: as the B operand wants them (shared_mlp_decode_layout.h) for
// 16-bit elements, row by row for float32.
template <class T>
FIPS_DEVICE Coord feature_place(int lane, int part) {
  if constexpr (sizeof(T) == 2) {
    return {part / 2 * 8 + lane / 4, part % 2 * 4 + lane % 4};
  } else {
    return {part * 4 + lane / 8, lane % 8};
  }
}

// Tokens past the last one, positions without a stored block and features past the edge are zeros.
template <class T, int kTokens>
FIPS_DEVICE void load_features(const DecodeTask& task, const StepMeta& meta,
                               StepFeatures<T, kTokens>& features) {
  using Step = DecodeStep<T>;
  constexpr int kGroupChunks = kDecodeGroup / Step::kChunk;
  const DecodeFeatures& source = task.features[meta.stage];
  const T* data = static_cast<const T*>(source.data);
  FIPS_UNROLL
  for (int i = 0; i < StepFeatures<T, kTokens>::kParts; ++i) {
    const Coord at = feature_place<T>(lane_index(), i);
    const int group_feature = meta.feature[at.col / kGroupChunks];
    const int feature = group_feature + at.col % kGroupChunks * Step::kChunk;
    const bool any = at.row < task.tokens && group_feature >= 0;
    const int count = any ? elements_below(feature, source.count, Step::kChunk) : 0;
    const T* from = data + at.row * source.stride + feature;
    features.part[i] = Chunk<T>{};
    if (count == Step::kChunk && source.wide) {
      features.part[i] = *reinterpret_cast<const Chunk<T>*>(from);
    } else if (count > 0) {
      features.part[i] = load_chunk_narrow(from, count);
    }
  }
}

// ---- sums
// ----------------------------------------------------------------------------------------

// Sums of one tile in shared memory, [matrix][warp][kTokens][kStride] float32: every warp's share
// of the reduction. The stride keeps an accumulator's outputs and token pairs in different banks.
template <int kTokens>
struct DecodeSums {
  static constexpr int kStride = kDecodeOut + 4;
  static constexpr int kMatrixFloats = kDecodeWarps * kTokens * kStride;
  static constexpr int kBytes = 2 * kMatrixFloats * 4;
  float* shared;

  FIPS_DEVICE_MEMBER float* at(int matrix, int warp, int token, int out) const {
    return shared + matrix * kMatrixFloats + (warp * kTokens + token) * kStride + out;
  }

  FIPS_DEVICE_MEMBER float total(int matrix, int token, int out) const {
    float sum = 0;
    FIPS_UNROLL
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      sum += *at(matrix, warp, token, out);
    }
    return sum;
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

// A fragments of both instructions of span `span` (32 positions).
FIPS_DEVICE void load_weights(const DecodeMatrix& m, const unsigned char* tile, int span,
                              uint32_t (&a)[2][4]) {
  const int lane = lane_index();
  if (m.transposed) {
    FIPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Coord at = column_tile_row(lane, i);
      const int offset = column_tile_offset<2>(span * kDecodeSpan + at.row, at.col);
      ldmatrix_x4_transposed(a[i], shared_address(tile + offset));
    }
  } else {
    const int row = lane / 4, chunk = span * 4 + lane % 4;
    const Words low = *reinterpret_cast<const Words*>(tile + row_tile_offset(row, chunk));
    const Words high = *reinterpret_cast<const Words*>(tile + row_tile_offset(row + 8, chunk));
    FIPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      a[i][0] = low.word[2 * i];
      a[i][1] = high.word[2 * i];
      a[i][2] = low.word[2 * i + 1];
      a[i][3] = high.word[2 * i + 1];
    }
  }
}

template <class T, int kTokens>
struct WarpSums {
  float value[kTokens / 8][4];

  FIPS_DEVICE_MEMBER void add_step(const DecodeMatrix& m, const unsigned char* tile,
                                   const StepFeatures<T, kTokens>& x, unsigned char*) {
    FIPS_UNROLL
    for (int span = 0; span < 2; ++span) {
      uint32_t a[2][4];
      load_weights(m, tile, span, a);
      FIPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        FIPS_UNROLL
        for (int t = 0; t < kTokens / 8; ++t) {
          const Chunk<T>& b = x.part[2 * t + span];
          mma_m16n8k16<T>(value[t], a[i], word_of(b, 2 * i), word_of(b, 2 * i + 1));
        }
      }
    }
  }

  FIPS_DEVICE_MEMBER void store(const DecodeSums<kTokens>& sums, int matrix) const {
    FIPS_UNROLL
    for (int t = 0; t < kTokens / 8; ++t) {
      FIPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Coord at = accumulator_coord(lane_index(), i);
        *sums.at(matrix, warp_index(), t * 8 + at.col, at.row) = value[t][i];
      }
    }
  }
};

// ---- float32
// -------------------------------------------------------------------------------------

// Of one warp, in shared memory. A lane sums one output for every other token.
template <int kTokens>
struct FloatFeatures {
  static constexpr int kStride = 36;  // two rows at one chunk lie in different banks
  float value[kTokens * kStride];
};

template <int kTokens>
struct WarpSums<float, kTokens> {
  float value[kTokens / 2];

  FIPS_DEVICE_MEMBER void add_step(const DecodeMatrix& m, const unsigned char* tile,
                                   const StepFeatures<float, kTokens>& x, unsigned char* scratch) {
    constexpr int kStride = FloatFeatures<kTokens>::kStride;
    float* rows = reinterpret_cast<FloatFeatures<kTokens>*>(scratch)->value;
    FIPS_UNROLL
    for (int i = 0; i < StepFeatures<float, kTokens>::kParts; ++i) {
      const Coord at = feature_place<float>(lane_index(), i);
      *reinterpret_cast<Chunk<float>*>(rows + at.row * kStride + at.col * 4) = x.part[i];
    }
    warp_barrier();
    const int out = lane_index() % kDecodeOut, first_token = lane_index() / kDecodeOut;
    FIPS_UNROLL_BY(2)
    for (int chunk = 0; chunk < DecodeStep<float>::kChunks; ++chunk) {
      const Chunk<float> w = load_chunk(m, tile, out, chunk);
      FIPS_UNROLL
      for (int i = 0; i < kTokens / 2; ++i) {
        const float* row = rows + (first_token + 2 * i) * kStride + chunk * 4;
        const Chunk<float> t = *reinterpret_cast<const Chunk<float>*>(row);
        FIPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          value[i] += w.element[r] * t.element[r];
        }
      }
    }
  }

  FIPS_DEVICE_MEMBER void store(const DecodeSums<kTokens>& sums, int matrix) const {
    const int out = lane_index() % kDecodeOut, first_token = lane_index() / kDecodeOut;
    FIPS_UNROLL
    for (int i = 0; i < kTokens / 2; ++i) {
      *sums.at(matrix, warp_index(), first_token + 2 * i, out) = value[i];
    }
  }

 private:
  // Four positions of one output.
  FIPS_DEVICE_MEMBER static Chunk<float> load_chunk(const DecodeMatrix& m,
                                                    const unsigned char* tile, int out, int chunk) {
    if (!m.transposed) {
      return *reinterpret_cast<const Chunk<float>*>(tile + row_tile_offset(out, chunk));
    }
    Chunk<float> w;
    FIPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int offset = column_tile_offset<4>(chunk * 4 + i, out / 4) + out % 4 * 4;
      w.element[i] = *reinterpret_cast<const float*>(tile + offset);
    }
    return w;
  }
};

}  // namespace fips::cuda
