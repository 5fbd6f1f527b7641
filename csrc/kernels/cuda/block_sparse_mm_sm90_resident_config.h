// Shapes and shared memory of the kernel that keeps x in shared memory
// (block_sparse_mm_sm90_resident_kernel.cuh).
#pragma once

#include "core/math.h"
#include "kernels/cuda/block_sparse_mm_sm90_config.h"

namespace fips::cuda {

inline constexpr int kResidentStages = 4;
inline constexpr int kResidentStoreTokens = 32;
inline constexpr int kResidentBarrierBytes = 512;

// Panels of [tokens][64 features] of x that fit beside a ring of weights and two output boxes per
// consumer.
inline constexpr int resident_panels(int tokens) {
  constexpr int kRingsBytes = kSm90Consumers * kResidentStages * kWTileBytes;
  constexpr int kStoresBytes =
      kSm90Consumers * kStoreBuffers * kResidentStoreTokens * kSwizzleRowBytes;
  return (kSm90SharedBytes - kRingsBytes - kStoresBytes - kResidentBarrierBytes) /
         (tokens * kSwizzleRowBytes);
}

// kN tokens of x, and per consumer a ring of weights [64 outputs][64 reduce], all with 128-byte
// swizzle.
template <class T, int kN_, bool kGated_>
struct ResidentConfig {
  using Element = T;
  static constexpr int kN = kN_;
  static constexpr bool kGated = kGated_, kTransposed = false;
  static constexpr int kProducts = kGated ? 2 : 1;
  static constexpr MmaMajor kWMajor = MmaMajor::kReduce;
  static constexpr int kStages = kResidentStages;
  static constexpr int kMaxPanels = resident_panels(kN);
  static constexpr int kPanelBytes = kN * kSwizzleRowBytes;
  static constexpr int kStoreTokens = kResidentStoreTokens;
  static constexpr int kStoreBytes = kStoreTokens * kSwizzleRowBytes;

  static constexpr int kRingsOffset = kMaxPanels * kPanelBytes;
  static constexpr int kStoresOffset = kRingsOffset + kSm90Consumers * kStages * kWTileBytes;
  static constexpr int kBarriersOffset =
      kStoresOffset + kSm90Consumers * kStoreBuffers * kStoreBytes;
  static constexpr int kPanelBarriersOffset = kBarriersOffset + 2 * kSm90Consumers * kStages * 8;
  static constexpr int kPanelIndexOffset = kPanelBarriersOffset + (kMaxPanels + 1) * 8;
  static constexpr int kSharedBytes = kBarriersOffset + kResidentBarrierBytes;

  static_assert(kPanelIndexOffset + kSm90Consumers * kStages * 4 <= kSharedBytes, "room");
  static_assert(kN % kStoreTokens == 0, "whole boxes");
};

}  // namespace fips::cuda
