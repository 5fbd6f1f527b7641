// Small pieces that every kernel shares, written on ptx.cuh only.
#pragma once

#include <cstdint>

#include "kernels/cuda/indexing.h"
#include "kernels/cuda/ptx.cuh"

namespace fips::cuda {

// 16 bytes of elements, moved as one access.
template <class T>
struct alignas(kChunkBytes) Chunk {
  static constexpr int kSize = kChunkBytes / static_cast<int>(sizeof(T));
  T element[kSize];
};

// Two neighbouring outputs, moved as one access.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T element[2];
};

// Thread blocks of `threads` threads, each with `live` registers of sums and operands, that should
// share a multiprocessor: as many as fit without spilling. Left to itself the compiler aims higher
// and spills.
constexpr int resident_blocks(int threads, int live) {
  const int registers = live <= 16 ? 96 : live <= 32 ? 128 : live <= 64 ? 168 : 255;
  const int blocks = 65536 / (threads * registers);
  return blocks > 0 ? blocks : 1;
}

FIPS_DEVICE int lane_index() { return thread_index() % kWarpSize; }
FIPS_DEVICE int warp_index() { return thread_index() / kWarpSize; }

FIPS_DEVICE uint32_t warp_sum(uint32_t value) {
  const int lane = lane_index();
  FIPS_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += shuffle(value, lane ^ step);
  }
  return value;
}

// Sum of `value` over the lanes below this one.
FIPS_DEVICE uint32_t warp_exclusive_sum(uint32_t value) {
  const int lane = lane_index();
  uint32_t sum = value;
  FIPS_UNROLL
  for (int step = 1; step < kWarpSize; step *= 2) {
    const uint32_t below = shuffle(sum, lane >= step ? lane - step : lane);
    sum += lane >= step ? below : 0;
  }
  return sum - value;
}

// The first `count` elements of a chunk, the rest zeros, from memory of any alignment.
template <class T>
FIPS_DEVICE Chunk<T> load_chunk_narrow(const T* source, int count) {
  Chunk<T> chunk{};
  FIPS_UNROLL
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    if (i < count) {
      chunk.element[i] = source[i];
    }
  }
  return chunk;
}

// Copies the first `count` elements of a chunk to shared memory and fills the rest with zeros. A
// wide copy is asynchronous, so readers wait for the copies and then for the block's barrier.
template <class T>
FIPS_DEVICE void stage_chunk(unsigned char* target, const T* source, int count, bool wide) {
  if (wide) {
    cp_async_16(shared_address(target), source, count * static_cast<int>(sizeof(T)));
  } else {
    *reinterpret_cast<Chunk<T>*>(target) = load_chunk_narrow(source, count);
  }
}

}  // namespace fips::cuda
