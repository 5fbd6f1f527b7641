// Shapes and shared memory of Hopper's block_sparse_mm, known at compile time.
#pragma once

#include "core/math.h"
#include "kernels/cuda/sm90_layout.h"

namespace fips::cuda {

inline constexpr int kSm90SharedBytes = 227 * 1024;  // what a thread block of sm_90 may ask for
inline constexpr int kSm90Consumers = 2;             // warpgroups; one more produces
inline constexpr int kSm90Threads = (kSm90Consumers + 1) * kWarpgroupSize;
inline constexpr int kSm90Reduce = kSwizzleRowBytes / 2;         // reduction positions of one stage
inline constexpr int kWTileBytes = kMmaRows * kSwizzleRowBytes;  // their weights for 64 outputs
inline constexpr int kWarpsPerWarpgroup = kWarpgroupSize / 32;

// Results leave in boxes of some tokens x 64 outputs; two buffers per consumer take turns.
inline constexpr int kStoreBuffers = 2;
inline constexpr int kStreamStoreTokens = 64;

// A stage holds x [kTokens][64] and w as the copy engine leaves them, with 128-byte swizzle:
//   w [kOut][64], reduction contiguous (K major), or for the transposed product kOut / 64 tiles of
//   [64 reduce][64 out], outputs contiguous (MN major).
// With 128 outputs each consumer takes 64 of them for all tokens; with 64, half of the tokens.
template <class T, int kOut_, int kTokens_, bool kTransposed_, bool kGated_>
struct Sm90Config {
  using Element = T;
  static constexpr int kOut = kOut_, kTokens = kTokens_;
  static constexpr bool kTransposed = kTransposed_, kGated = kGated_;
  static constexpr bool kSplitTokens = kOut == kMmaRows;
  static constexpr int kProducts = kGated ? 2 : 1;
  static constexpr int kN = kSplitTokens ? kTokens / kSm90Consumers : kTokens;  // of one wgmma
  static constexpr MmaMajor kWMajor = kTransposed ? MmaMajor::kMN : MmaMajor::kReduce;

  static constexpr int kXBytes = kTokens * kSwizzleRowBytes;
  static constexpr int kStageBytes = kXBytes + kOut * kSwizzleRowBytes;

  static constexpr int kStoreTokens = kStreamStoreTokens;
  static constexpr int kStoreBytes = kStoreTokens * kSwizzleRowBytes;
  static constexpr int kStoresBytes = kSm90Consumers * kStoreBuffers * kStoreBytes;

  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages =
      static_cast<int>(min_of(8, (kSm90SharedBytes - kStoresBytes - kBarrierBytes) / kStageBytes));
  static constexpr int kStoresOffset = kStages * kStageBytes;
  static constexpr int kBarriersOffset = kStoresOffset + kStoresBytes;
  static constexpr int kSharedBytes = kBarriersOffset + kBarrierBytes;

  static_assert(kStages >= 4, "loads are four steps ahead");
  static_assert(2 * kStages * 8 <= kBarrierBytes, "a full and an empty mbarrier per stage");
  static_assert(kN % kStoreTokens == 0, "whole boxes");
};

}  // namespace fips::cuda
