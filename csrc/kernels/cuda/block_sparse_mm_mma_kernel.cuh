// block_sparse_mm on tensor cores (mma.sync, sm_80 and later), for bfloat16, float16 and, as TF32,
// float32: tokens are the 16 rows of an instruction, output features its 8 columns, sums are
// float32. An instruction covers 32 bytes of the reduction whatever the element type.
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
  static constexpr int kSums = kTokenSteps * kOutSteps * 4;  // a thread's
  // Rounding to TF32 and, beside many sums, expanding a bitmap take registers of their own.
  static constexpr bool kCrowded =
      sizeof(typename Config::Element) == 4 || (Config::kBitmap && kSums >= 64);
  static constexpr int kMinBlocks = resident_blocks(kThreads, kSums + (kCrowded ? 8 : 0));
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

// B fragments of one instruction's depth x 16 outputs: {b0, b1} of two instructions. `chunk` is the
// first of two 16-byte chunks along the reduction.
template <class Config>
FIPS_DEVICE void load_w_fragments(uint32_t (&b)[4], const unsigned char* w_tile, int out,
                                  int chunk) {
  constexpr int kChunks = Config::kWChunks;
  if constexpr (!Config::kTransposed) {
    const Coord at = ldmatrix_b(lane_index());
    ldmatrix_x4(b, shared_address(w_tile + swizzled_offset<kChunks>(out + at.row, chunk + at.col)));
  } else if constexpr (sizeof(typename Config::Element) == 2) {
    const Coord at = ldmatrix_b_transposed(lane_index());
    const int offset = swizzled_offset<kChunks>(chunk * 8 + at.row, out / 8 + at.col);
    ldmatrix_x4_transposed(b, shared_address(w_tile + offset));
  } else {  // 32-bit elements cannot be transposed by ldmatrix
    FIPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int reduce = chunk * 4 + i % 2 * 4 + lane_index() % 4;
      const int column = out + i / 2 * 8 + lane_index() / 4;
      const int offset = swizzled_offset<kChunks>(reduce, column / 4) + column % 4 * 4;
      b[i] = *reinterpret_cast<const uint32_t*>(w_tile + offset);
    }
  }
}

template <class T>
FIPS_DEVICE void round_operands(uint32_t (&r)[4]) {
  if constexpr (sizeof(T) == 4) {
    FIPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      r[i] = to_tf32(r[i]);
    }
  }
}

template <class T>
FIPS_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 4) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  } else {
    mma_m16n8k16<T>(d, a, b0, b1);
  }
}

// One instruction's depth, chunks `chunk` and `chunk` + 1 of the stage, of the warp's tile.
template <class Config>
FIPS_DEVICE void multiply_step(MmaSums<Config>& sums, const unsigned char* stage,
                               const WarpPlace& place, int chunk) {
  using Warps = MmaWarps<Config>;
  using T = typename Config::Element;
  uint32_t a[Warps::kTokenSteps][4];
  const Coord at = ldmatrix_a(lane_index());
  FIPS_UNROLL
  for (int i = 0; i < Warps::kTokenSteps; ++i) {
    const int row = place.token + i * 16 + at.row;
    const int offset = swizzled_offset<Config::kReduceChunks>(row, chunk + at.col);
    ldmatrix_x4(a[i], shared_address(stage + offset));
    round_operands<T>(a[i]);
  }
  FIPS_UNROLL
  for (int j = 0; j < Warps::kOutSteps; j += 2) {
    uint32_t b[4];
    load_w_fragments<Config>(b, stage + Config::kXBytes, place.out + j * 8, chunk);
    round_operands<T>(b);
    FIPS_UNROLL
    for (int i = 0; i < Warps::kTokenSteps; ++i) {
      multiply_add<T>(sums.value[i][j], a[i], b[0], b[1]);
      multiply_add<T>(sums.value[i][j + 1], a[i], b[2], b[3]);
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
    for (int share = 0; share < Config::kReduceChunks / 2 / Warps::kSplit; ++share) {
      multiply_step<Config>(sums, stage, place, (share * Warps::kSplit + place.split) * 2);
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
