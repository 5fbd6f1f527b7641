// Epilogue of block_sparse_mm: the warps leave their float32 sums in shared memory, from where rows
// go out in 16-byte pieces with bias, activation and gate applied and one rounding.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/common.cuh"

namespace fips::cuda {

// Sums of one tile in shared memory: [kSplits][kTokens][kStride] float32, where the warps of
// different splits hold parts of the same outputs. The stride keeps the rows of an accumulator
// (eight, two columns a lane) in different banks.
template <int kTokens, int kOut, int kSplits>
struct SumTile {
  static constexpr int kStride = kOut + 8;
  static constexpr int kBytes = kSplits * kTokens * kStride * 4;

  float* shared;

  FIPS_DEVICE_MEMBER float* at(int split, int token, int out) const {
    return shared + (split * kTokens + token) * kStride + out;
  }
};

struct OutPlace {
  int64_t token;  // first token
  int feature;    // first output feature
};

template <class T>
FIPS_DEVICE float load_one(const T* row, int feature, int limit) {
  return row != nullptr && feature < limit ? to_float(row[feature]) : 0.0f;
}

// kThreads threads store the tile. The caller has put a barrier behind the last write to it.
template <class T, int kTokens, int kOut, int kSplits, int kThreads>
FIPS_DEVICE void store_tile(const MmTask& task, const OutPlace& place,
                            const SumTile<kTokens, kOut, kSplits>& sums) {
  constexpr int kChunk = Chunk<T>::kSize, kChunks = kOut / kChunk;
  const T* bias = static_cast<const T*>(task.bias);
  FIPS_UNROLL_BY(1)
  for (int item = thread_index(); item < kTokens * kChunks; item += kThreads) {
    const int row = item / kChunks, column = item % kChunks * kChunk;
    const int64_t token = place.token + row;
    const int feature = place.feature + column;
    if (token >= task.tokens || feature >= task.out_features) {
      continue;
    }
    T* out = static_cast<T*>(task.out) + token * task.out_stride;
    const T* gate =
        task.gate == nullptr ? nullptr : static_cast<const T*>(task.gate) + token * task.out_stride;
    const bool wide = task.wide_out && feature + kChunk <= task.out_features;
    Chunk<T> gates{};
    if (gate != nullptr && wide) {
      gates = *reinterpret_cast<const Chunk<T>*>(gate + feature);
    }
    Chunk<T> result;
    FIPS_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      float sum = *sums.at(0, row, column + i);
      FIPS_UNROLL
      for (int split = 1; split < kSplits; ++split) {
        sum += *sums.at(split, row, column + i);
      }
      sum += load_one(bias, feature + i, task.out_features);
      if (gate == nullptr) {
        sum = activate<T>(task.activation, sum);
      } else {
        const float g =
            wide ? to_float(gates.element[i]) : load_one(gate, feature + i, task.out_features);
        sum *= activate<T>(task.activation, g);
      }
      result.element[i] = from_float<T>(sum);
    }
    if (wide) {
      *reinterpret_cast<Chunk<T>*>(out + feature) = result;
    } else {
      FIPS_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (feature + i < task.out_features) {
          out[feature + i] = result.element[i];
        }
      }
    }
  }
}

}  // namespace fips::cuda
