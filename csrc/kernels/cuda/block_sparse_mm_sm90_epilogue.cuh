// Epilogue of Hopper's block_sparse_mm: bias, activation and gate on the float32 sums in registers,
// one rounding, transposed through shared memory ([outputs][tokens] in registers, tokens by outputs
// in memory) and stored by the copy engine while the next tile runs.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/block_sparse_mm_sm90_pipeline.cuh"

namespace fips::cuda {

// A thread's registers hold two output features: these are their biases, as stored.
template <class Config>
struct Sm90Bias {
  typename Config::Element value[Config::kProducts][2];
};

// The 64 outputs and kN tokens that a consumer sums.
struct ConsumerPlace {
  int consumer, feature, token;
};

template <class Config>
FIPS_DEVICE Sm90Bias<Config> load_bias(const Sm90Task& task, const ConsumerPlace& at) {
  using T = typename Config::Element;
  Sm90Bias<Config> bias{};
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    const T* source = static_cast<const T*>(task.product[p].bias);
    FIPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int feature =
          at.feature + mma_accumulator(thread_index() % kWarpgroupSize, 2 * half).row;
      if (source != nullptr && feature < task.out_features) {
        bias.value[p][half] = source[feature];
      }
    }
  }
  return bias;
}

template <class Config, Activation kActivation>
FIPS_DEVICE float finished(const Sm90Sums<Config>& sums, const Sm90Bias<Config>& bias, int index) {
  using T = typename Config::Element;
  const int half = index / 2 % 2;
  const float first =
      activate<T>(kActivation, sums.value[0][index] + to_float(bias.value[0][half]));
  if constexpr (Config::kGated) {
    return first * (sums.value[1][index] + to_float(bias.value[1][half]));
  } else {
    return first;
  }
}

// The two buffers of a consumer take turns, across tiles too (`turn` is the next one); its first
// thread stores, and so knows which stores have yet to leave a buffer.
template <class Config, Activation kActivation, class Shared>
FIPS_DEVICE void store_sums(const Sm90Task& task, const Shared& shared, const ConsumerPlace& at,
                            const Sm90Sums<Config>& sums, const Sm90Bias<Config>& bias, int& turn) {
  using T = typename Config::Element;
  const int thread = thread_index() % kWarpgroupSize;
  FIPS_UNROLL
  for (int box = 0; box < Config::kN / Config::kStoreTokens; ++box) {
    const SharedAddress buffer = shared.store(at.consumer, turn);
    turn ^= 1;
    if (thread == 0) {
      tensor_store_wait_read<kStoreBuffers - 1>();
    }
    named_barrier(1 + at.consumer, kWarpgroupSize);
    FIPS_UNROLL
    for (int column = 0; column < Config::kStoreTokens; column += 16) {
      const int index = (box * Config::kStoreTokens + column) / 2;
      uint32_t pairs[4];
      FIPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        pairs[i] = pack_pair<T>(finished<Config, kActivation>(sums, bias, index + 2 * i),
                                finished<Config, kActivation>(sums, bias, index + 2 * i + 1));
      }
      stmatrix_x4_transposed(buffer + transposed_store_offset(thread, column), pairs);
    }
    fence_shared_writes();
    named_barrier(1 + at.consumer, kWarpgroupSize);
    if (thread == 0) {
      tensor_store(task.out, at.feature, at.token + box * Config::kStoreTokens, buffer);
      tensor_store_commit();
    }
  }
}

// The activation is chosen once per tile, outside the unrolled loops. The transposed product has
// none.
template <class Config, class Shared>
FIPS_DEVICE void finish_tile(const Sm90Task& task, const Shared& shared, const ConsumerPlace& at,
                             const Sm90Sums<Config>& sums, const Sm90Bias<Config>& bias,
                             int& turn) {
  if constexpr (!Config::kTransposed) {
    switch (task.activation) {
      case Activation::kGelu:
        return store_sums<Config, Activation::kGelu>(task, shared, at, sums, bias, turn);
      case Activation::kGeluTanh:
        return store_sums<Config, Activation::kGeluTanh>(task, shared, at, sums, bias, turn);
      case Activation::kSilu:
        return store_sums<Config, Activation::kSilu>(task, shared, at, sums, bias, turn);
      case Activation::kRelu:
        return store_sums<Config, Activation::kRelu>(task, shared, at, sums, bias, turn);
      case Activation::kRelu2:
        return store_sums<Config, Activation::kRelu2>(task, shared, at, sums, bias, turn);
      case Activation::kQuickGelu:
        return store_sums<Config, Activation::kQuickGelu>(task, shared, at, sums, bias, turn);
      default:
        break;
    }
  }
  store_sums<Config, Activation::kIdentity>(task, shared, at, sums, bias, turn);
}

// Shared memory may not go away before the last stores have read it.
FIPS_DEVICE void finish_stores() {
  if (thread_index() % kWarpgroupSize == 0) {
    tensor_store_wait_read<0>();
  }
}

template <class Config>
FIPS_DEVICE void prefetch_tensor_maps(const Sm90Task& task) {
  prefetch_tensor_map(task.x);
  prefetch_tensor_map(task.out);
  FIPS_UNROLL
  for (int p = 0; p < Config::kProducts; ++p) {
    prefetch_tensor_map(task.product[p].values);
  }
}

}  // namespace fips::cuda
