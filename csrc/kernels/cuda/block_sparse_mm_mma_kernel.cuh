// block_sparse_mm for bfloat16 and float16 on tensor cores (mma.sync, sm_80 and later): tokens are
// the 16 rows of an instruction, output features its 8 columns, sums are float32.
#pragma once

#include "kernels/cuda/block_sparse_mm_epilogue.cuh"
#include "kernels/cuda/block_sparse_mm_load.cuh"

namespace fips::cuda {

// How the warps of a thread block share a tile: by tokens, by outputs, and, when the tile is too
// small for that, by reduction steps (their sums are added at the end, in a fixed order).
template <class Config>
struct MmaWarps {
  static constexpr int kTokens = Config::kTokens == 16   ? 1
                                 : Config::kTokens == 64 ? (Config::kOut >= 64 ? 2 : 4)
                                                         : 4;
  static constexpr int kOut = Config::kTokens == 16   ? (Config::kOut >= 64 ? Config::kOut / 32 : 1)
                              : Config::kTokens == 64 ? (Config::kOut >= 64 ? 2 : 1)
                                                      : (Config::kOut == 128 ? 2 : 1);
  static constexpr int kSplit = Config::kTokens == 16 ? 4 / kOut : 1;
  static constexpr int kCount = kTokens * kOut * kSplit;
  static constexpr int kThreads = kCount * kWarpSize;
  static constexpr int kTokenSteps =
      Config::kTokens / kTokens / 16;                        // instructions down a warp's tile
  static constexpr int kOutSteps = Config::kOut / kOut / 8;  // and across it
  static constexpr int kMinBlocks = resident_blocks(kThreads, kTokenSteps* kOutSteps * 4);
};

struct WarpPlace {
  int token, out;  // first token and output of the warp inside the tile
  int split;       // which share of the reduction steps
};

template <class Config>
FIPS_DEVICE WarpPlace locate_warp() {
  using Warps = MmaWarps<Config>;
  const int warp = warp_index();
  return {warp % Warps::kTokens * (Config::kTokens / Warps::kTokens),
          warp / Warps::kTokens % Warps::kOut * (Config::kOut / Warps::kOut),
          warp / (Warps::kTokens * Warps::kOut)};
}

template <class Config>
struct MmaSums {
  float value[MmaWarps<Config>::kTokenSteps][MmaWarps<Config>::kOutSteps][4];
};

// B fragments of 16 reduction positions x 16 outputs: {b0, b1} of two instructions.
template <class Config>
FIPS_DEVICE void load_w_fragments(uint32_t (&b)[4], const unsigned char* w_tile, int out,
                                  int reduce) {
  constexpr int kChunks = Config::kWChunks;
  if constexpr (Config::kTransposed) {
    const Coord at = ldmatrix_b_transposed(lane_index());
    const int offset = swizzled_offset<kChunks>(reduce + at.row, out / 8 + at.col);
    ldmatrix_x4_transposed(b, shared_address(w_tile + offset));
  } else {
    const Coord at = ldmatrix_b(lane_index());
    const int offset = swizzled_offset<kChunks>(out + at.row, reduce / 8 + at.col);
    ldmatrix_x4(b, shared_address(w_tile + offset));
  }
}

// One instruction's depth, 16 reduction positions, of the warp's tile.
template <class Config>
FIPS_DEVICE void multiply_step(MmaSums<Config>& sums, const unsigned char* stage,
                               const WarpPlace& place, int reduce) {
  using Warps = MmaWarps<Config>;
  uint32_t a[Warps::kTokenSteps][4];
  const Coord at = ldmatrix_a(lane_index());
  FIPS_UNROLL
  for (int i = 0; i < Warps::kTokenSteps; ++i) {
    const int row = place.token + i * 16 + at.row;
    const int offset = swizzled_offset<Config::kReduceChunks>(row, reduce / 8 + at.col);
    ldmatrix_x4(a[i], shared_address(stage + offset));
  }
  FIPS_UNROLL
  for (int j = 0; j < Warps::kOutSteps; j += 2) {
    uint32_t b[4];
    load_w_fragments<Config>(b, stage + Config::kXBytes, place.out + j * 8, reduce);
    FIPS_UNROLL
    for (int i = 0; i < Warps::kTokenSteps; ++i) {
      mma_m16n8k16<typename Config::Element>(sums.value[i][j], a[i], b[0], b[1]);
      mma_m16n8k16<typename Config::Element>(sums.value[i][j + 1], a[i], b[2], b[3]);
    }
  }
}

template <class Config>
using MmaSumTile = SumTile<Config::kTokens, Config::kOut, MmaWarps<Config>::kSplit>;

template <class Config>
FIPS_DEVICE void write_sums(const MmaSumTile<Config>& tile, const MmaSums<Config>& sums,
                            const WarpPlace& place) {
  using Warps = MmaWarps<Config>;
  FIPS_UNROLL
  for (int i = 0; i < Warps::kTokenSteps; ++i) {
    FIPS_UNROLL
    for (int j = 0; j < Warps::kOutSteps; ++j) {
      FIPS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Coord at = accumulator_coord(lane_index(), 2 * half);
        const float(&sum)[4] = sums.value[i][j];
        float* target =
            tile.at(place.split, place.token + i * 16 + at.row, place.out + j * 8 + at.col);
        *reinterpret_cast<Pair<float>*>(target) = {{sum[2 * half], sum[2 * half + 1]}};
      }
    }
  }
}

template <class Config>
FIPS_KERNEL(MmaWarps<Config>::kThreads, MmaWarps<Config>::kMinBlocks)
block_sparse_mm_mma(const MmTask task) {
  using Warps = MmaWarps<Config>;
  unsigned char* shared = dynamic_shared_memory();
  const MmTile tile = locate_tile<Config>(task);
  const WarpPlace place = locate_warp<Config>();
  MmaSums<Config> sums{};
  pipeline<Config, Warps::kThreads>(task, tile, shared, [&](const unsigned char* stage) {
    FIPS_UNROLL
    for (int share = 0; share < Config::kReduce / 16 / Warps::kSplit; ++share) {
      multiply_step<Config>(sums, stage, place, (share * Warps::kSplit + place.split) * 16);
    }
  });
  const MmaSumTile<Config> sum_tile{reinterpret_cast<float*>(shared)};
  static_assert(MmaSumTile<Config>::kBytes <= Config::kSharedBytes, "the stages are reused");
  block_barrier();  // the last stage has been read
  write_sums<Config>(sum_tile, sums, place);
  block_barrier();
  store_tile<typename Config::Element, Config::kTokens, Config::kOut, Warps::kSplit,
             Warps::kThreads>(task, {tile.token, tile.out_block * Config::kOut}, sum_tile);
}

}  // namespace fips::cuda
