// block_sparse_mm for float32 by scalar multiply-adds: every thread sums a small grid of outputs,
// tokens 8 apart and features 16 apart, so that a warp's shared-memory reads are broadcasts or free
// of conflicts.
#pragma once

#include "kernels/cuda/block_sparse_mm_epilogue.cuh"
#include "kernels/cuda/block_sparse_mm_load.cuh"

namespace fips::cuda {

template <class Config>
struct FfmaThreads {
  static constexpr int kOut = 16, kTokens = 8;
  static constexpr int kThreads = kOut * kTokens;
  static constexpr int kTokenSteps = Config::kTokens / kTokens;
  static constexpr int kOutSteps = Config::kOut / kOut;
  static constexpr int kMinBlocks = resident_blocks(kThreads, kTokenSteps*(kOutSteps + 4));
};

template <class Config>
struct FfmaSums {
  float value[FfmaThreads<Config>::kTokenSteps][FfmaThreads<Config>::kOutSteps];
};

template <class Config>
FIPS_DEVICE Chunk<float> read_x(const unsigned char* stage, int row, int chunk) {
  const int offset = swizzled_offset<Config::kReduceChunks>(row, chunk);
  return *reinterpret_cast<const Chunk<float>*>(stage + offset);
}

// Four reduction positions of one output.
template <class Config>
FIPS_DEVICE Chunk<float> read_w(const unsigned char* w_tile, int out, int chunk) {
  if constexpr (!Config::kTransposed) {
    const int offset = swizzled_offset<Config::kWChunks>(out, chunk);
    return *reinterpret_cast<const Chunk<float>*>(w_tile + offset);
  } else {
    Chunk<float> w;
    FIPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int offset = swizzled_offset<Config::kWChunks>(chunk * 4 + i, out / 4) + out % 4 * 4;
      w.element[i] = *reinterpret_cast<const float*>(w_tile + offset);
    }
    return w;
  }
}

template <class Config>
FIPS_DEVICE void multiply_chunk(FfmaSums<Config>& sums, const unsigned char* stage, int chunk) {
  using Threads = FfmaThreads<Config>;
  const int first_row = thread_index() / Threads::kOut, first_out = thread_index() % Threads::kOut;
  Chunk<float> x[Threads::kTokenSteps];
  FIPS_UNROLL
  for (int i = 0; i < Threads::kTokenSteps; ++i) {
    x[i] = read_x<Config>(stage, first_row + i * Threads::kTokens, chunk);
  }
  FIPS_UNROLL
  for (int j = 0; j < Threads::kOutSteps; ++j) {
    const Chunk<float> w =
        read_w<Config>(stage + Config::kXBytes, first_out + j * Threads::kOut, chunk);
    FIPS_UNROLL
    for (int i = 0; i < Threads::kTokenSteps; ++i) {
      FIPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        sums.value[i][j] += x[i].element[r] * w.element[r];
      }
    }
  }
}

template <class Config>
FIPS_KERNEL(FfmaThreads<Config>::kThreads, FfmaThreads<Config>::kMinBlocks)
block_sparse_mm_ffma(const MmTask task) {
  using Threads = FfmaThreads<Config>;
  unsigned char* shared = dynamic_shared_memory();
  const MmTile tile = locate_tile<Config>(task);
  FfmaSums<Config> sums{};
  pipeline<Config, Threads::kThreads>(task, tile, shared, [&](const unsigned char* stage) {
    FIPS_UNROLL_BY(1)
    for (int chunk = 0; chunk < Config::kReduceChunks; ++chunk) {
      multiply_chunk<Config>(sums, stage, chunk);
    }
  });
  using Tile = SumTile<Config::kTokens, Config::kOut, 1>;
  static_assert(Tile::kBytes <= Config::kSharedBytes, "the stages are reused");
  const Tile sum_tile{reinterpret_cast<float*>(shared)};
  block_barrier();  // the last stage has been read
  FIPS_UNROLL
  for (int i = 0; i < Threads::kTokenSteps; ++i) {
    FIPS_UNROLL
    for (int j = 0; j < Threads::kOutSteps; ++j) {
      *sum_tile.at(0, thread_index() / Threads::kOut + i * Threads::kTokens,
                   thread_index() % Threads::kOut + j * Threads::kOut) = sums.value[i][j];
    }
  }
  block_barrier();
  store_tile<float, Config::kTokens, Config::kOut, 1, Threads::kThreads>(
      task, {tile.token, tile.out_block * Config::kOut}, sum_tile);
}

}  // namespace fips::cuda
