// Epilogue of block_sparse_mm: float32 sums plus bias, rounded once, to global memory.
#pragma once

#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/common.cuh"

namespace fips::cuda {

template <class T>
FIPS_DEVICE float bias_at(const MmTask& task, int feature) {
  const bool present = task.bias != nullptr && feature < task.out_features;
  return present ? to_float(static_cast<const T*>(task.bias)[feature]) : 0.0f;
}

template <class T>
FIPS_DEVICE void store_one(const MmTask& task, int64_t token, int feature, float sum) {
  if (token < task.tokens && feature < task.out_features) {
    static_cast<T*>(task.out)[token * task.out_stride + feature] = from_float<T>(sum);
  }
}

// Outputs (token, feature) and (token, feature + 1), `feature` even.
template <class T>
FIPS_DEVICE void store_two(const MmTask& task, int64_t token, int feature, float sum0, float sum1) {
  if (!task.wide_out || feature + 1 >= task.out_features) {
    store_one<T>(task, token, feature, sum0);
    store_one<T>(task, token, feature + 1, sum1);
  } else if (token < task.tokens) {
    T* out = static_cast<T*>(task.out) + token * task.out_stride + feature;
    *reinterpret_cast<Pair<T>*>(out) = Pair<T>{{from_float<T>(sum0), from_float<T>(sum1)}};
  }
}

}  // namespace fips::cuda
