// What Hopper's instructions ask of shared memory and registers, as plain host/device functions, so
// that kernels and emulation share one statement of each fact and tests can check it against a
// naive product (tests/cpp/test_cuda_sm90.cpp). Sources: the PTX ISA ("wgmma", "cp.async.bulk.
// tensor", "stmatrix") and, for the canonical layouts in CuTe's notation, CUTLASS
// (cute/atom/mma_traits_sm90_gmma.hpp, cute/arch/mma_sm90_desc.hpp).
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

inline constexpr int kWarpgroupSize = 128;
inline constexpr int kMmaRows = 64;    // M of every wgmma
inline constexpr int kMmaReduce = 16;  // its K for 16-bit elements

// ---- 128-byte swizzle
// ----------------------------------------------------------------------------

// Rows of 128 bytes, eight of which (1024 bytes) form the pattern: the 16-byte chunk of an address
// (bits 4 to 6) is exclusive-ored with its row (bits 7 to 9). PTX ISA, "swizzling modes"; CuTe's
// Swizzle<3, 4, 3>. Tensor copies and wgmma apply it to the address itself, so tiles start at
// multiples of 1024 bytes.
inline constexpr int kSwizzleRowBytes = 128;
inline constexpr int kSwizzlePatternBytes = 1024;

FIPS_INLINE FIPS_HOST_DEVICE uint32_t swizzle_128(uint32_t address) {
  return address ^ (((address >> 7) & 7u) << 4);
}

// ---- wgmma operands in shared memory
// ------------------------------------------------------------------

// Which index of an operand is contiguous: the reduction (K), or the rows of A / columns of B (MN).
// Immediate imm-trans-a / imm-trans-b of the instruction is 1 for kMN; 16-bit types only.
enum class MmaMajor : int { kReduce = 0, kMN = 1 };

// PTX ISA, "Matrix Descriptor Format" of wgmma: byte quantities are stored as (x & 0x3ffff) >> 4.
//   bits  0-13 start address      bits 16-29 leading dimension byte offset
//   bits 32-45 stride dimension byte offset     bits 49-51 base offset (0: the pattern starts at a
//   multiple of 1024 bytes)       bits 62-63 swizzle (0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes)
FIPS_INLINE FIPS_HOST_DEVICE uint64_t encode_descriptor_bytes(uint32_t bytes) {
  return (bytes & 0x3ffffu) >> 4;
}

inline constexpr int kDescriptorSwizzle128 = 1;

// A tile with 128-byte swizzle at `address`, of rows of 128 bytes, as a tensor copy with an inner
// box of 128 bytes leaves it. Both majors step 1024 bytes between groups of eight rows:
//   K  major ((8,m),(T,2)):((8T,SBO),(1,T))         SBO = 1024; LBO is not used, assumed 1
//   MN major ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))   SBO = 1024; LBO between groups of 64 rows or
//                                                   columns, of which M = 64 has one
FIPS_INLINE FIPS_HOST_DEVICE uint64_t mma_descriptor(uint32_t address,
                                                     uint32_t leading_bytes = 16) {
  return encode_descriptor_bytes(address) | encode_descriptor_bytes(leading_bytes) << 16 |
         encode_descriptor_bytes(kSwizzlePatternBytes) << 32 |
         static_cast<uint64_t>(kDescriptorSwizzle128) << 62;
}

// How far 16 reduction positions move the start of an operand, in descriptor units of 16 bytes: 32
// bytes along a row (K major: the swizzle acts on address bits, so the start may lie inside a
// pattern's row), or 16 rows (MN major).
FIPS_INLINE FIPS_HOST_DEVICE constexpr uint32_t mma_reduce_step(MmaMajor major) {
  return (major == MmaMajor::kReduce ? kMmaReduce * 2 : kMmaReduce * kSwizzleRowBytes) >> 4;
}

// Byte offset of element (mn, k) of an operand from its start, before the swizzle; 16-bit elements.
FIPS_INLINE FIPS_HOST_DEVICE uint32_t mma_operand_offset(MmaMajor major, int mn, int k,
                                                         uint32_t leading_bytes,
                                                         uint32_t stride_bytes) {
  return major == MmaMajor::kReduce
             ? static_cast<uint32_t>(mn / 8) * stride_bytes + mn % 8 * 128 + k * 2
             : static_cast<uint32_t>(mn / 64) * leading_bytes + mn % 64 * 2 +
                   static_cast<uint32_t>(k / 8) * stride_bytes + k % 8 * 128;
}

// ---- wgmma accumulators
// -------------------------------------------------------------------------------

// Element {row, column} of the 64 x N float32 accumulator that register `index` of a warpgroup's
// thread holds (PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16"; CUTLASS CLayout_64xN).
FIPS_INLINE FIPS_HOST_DEVICE Coord mma_accumulator(int thread, int index) {
  const int lane = thread % kWarpSize;
  return {thread / kWarpSize * 16 + lane / 4 + index / 2 % 2 * 8,
          index / 4 * 8 + lane % 4 * 2 + index % 2};
}

// ---- storing accumulators transposed
// ------------------------------------------------------------------

// Registers {4j, 4j+1}, {4j+2, 4j+3} and the next four, packed in pairs, are the fragments of four
// 8x8 matrices: rows 0-7 and 8-15 of the warp, columns 8j and then 8j+8. stmatrix.x4.trans writes
// column c of a matrix as 16 contiguous bytes at the address that lane 8 * matrix + c gives: this
// function, for an output tile of [columns][64 rows of the accumulator] with 128-byte swizzle.
FIPS_INLINE FIPS_HOST_DEVICE uint32_t transposed_store_offset(int thread, int column) {
  const int lane = thread % kWarpSize;
  const int chunk = thread / kWarpSize * 2 + lane / 8 % 2;
  const int row = column + lane / 16 * 8 + lane % 8;
  return swizzle_128(static_cast<uint32_t>(row * kSwizzleRowBytes + chunk * 16));
}

}  // namespace fips::cuda
