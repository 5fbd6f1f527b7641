// Hopper's own instructions (sm_90a): mbarriers, bulk tensor copies, warpgroup matrix products,
// register reallocation. With FIPS_HOST_EMULATION the same functions come from emulation_sm90.h.
// Facts are from the PTX ISA; shared-memory and register layouts are in sm90_layout.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sm90_layout.h"
#include "kernels/cuda/tensor_map.h"

#if defined(FIPS_HOST_EMULATION)

#include "kernels/cuda/emulation_sm90.h"

#else

// A kernel parameter that stays where it is, so that tensor maps in it have an address.
#define FIPS_GRID_CONSTANT __grid_constant__

namespace fips::cuda {

// Dynamic shared memory, aligned for tiles with 128-byte swizzle.
FIPS_DEVICE unsigned char* dynamic_tile_memory() {
  extern __shared__ __align__(1024) unsigned char fips_tile_memory[];
  return fips_tile_memory;
}

// ---- threads
// -------------------------------------------------------------------------------------

// True in one lane of the warp, always the same one; every lane takes part.
FIPS_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

// A barrier of `threads` threads; ids 1 to 15 (0 is block_barrier's).
FIPS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Registers per thread from here on, by every warp of a warpgroup: a multiple of 8 from 24 to 256.
// Giving away is immediate; taking waits until other warpgroups have given enough.
template <int kRegisters>
FIPS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
FIPS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- mbarriers
// -------------------------------------------------------------------------------------
// An 8-byte object in shared memory. A phase completes when `arrivals` threads have arrived and all
// bytes announced with arrive_expect have come; the next one begins at once.

FIPS_DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// After the inits, by the thread that made them and before a block barrier: makes them visible to
// the other threads and to the copy engine.
FIPS_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

FIPS_DEVICE void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

FIPS_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase of parity `parity` is complete: parity 0 names the first phase, and on a
// fresh barrier parity 1 returns at once.
FIPS_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "FIPS_WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra FIPS_WAIT_%=;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copies
// ----------------------------------------------------------------------------

FIPS_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// One thread starts copying the box at {column, row} of the tensor to shared memory; its bytes,
// those outside the tensor included (zeros), count towards `barrier`.
FIPS_DEVICE void tensor_load(SharedAddress target, const TensorMap& map, int column, int row,
                             SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];\n" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// One thread starts copying a box from shared memory; elements outside the tensor are dropped.
FIPS_DEVICE void tensor_store(const TensorMap& map, int column, int row, SharedAddress source) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(&map),
      "r"(column), "r"(row), "r"(source)
      : "memory");
}

FIPS_DEVICE void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's committed stores have yet to read shared memory.
template <int kPending>
FIPS_DEVICE void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

// Ordinary writes of this thread to shared memory become visible to tensor copies and wgmma.
FIPS_DEVICE void fence_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// ---- matrices
// --------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements, each written transposed; lane l gives the address of column
// l % 8 of matrix l / 8.
FIPS_DEVICE void stmatrix_x4_transposed(SharedAddress address, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// {low, high} rounded to two 16-bit elements of one register.
template <class T>
FIPS_DEVICE uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Where `address` lies in the shared window, which is what descriptors hold.
FIPS_DEVICE uint32_t shared_window_address(SharedAddress address) { return address; }

// Before the first wgmma of a commit group: orders earlier uses of its registers.
FIPS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
FIPS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most kPending committed groups of wgmma are still under way.
template <int kPending>
FIPS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The compiler takes the registers of a wgmma for written when the instruction is issued: this
// keeps it from moving uses of them above a wait, or writes below an issue.
template <int kCount>
FIPS_DEVICE void wgmma_settle(float (&d)[kCount]) {
  FIPS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

// Zeros, by moves that the compiler does not turn into selects where few sums are empty.
template <int kCount>
FIPS_DEVICE void wgmma_clear(float (&d)[kCount]) {
  FIPS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
  }
}

#define FIPS_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FIPS_F16(i) FIPS_F4(i), FIPS_F4(i + 4), FIPS_F4(i + 8), FIPS_F4(i + 12)
#define FIPS_F32(i) FIPS_F16(i), FIPS_F16(i + 16)
#define FIPS_D32 FIPS_F32(0)
#define FIPS_D64 FIPS_D32, FIPS_F32(32)
#define FIPS_D48 FIPS_D32, FIPS_F16(32)
#define FIPS_D96 FIPS_D64, FIPS_F32(64)
#define FIPS_D128 FIPS_D96, FIPS_F32(96)
#define FIPS_R0                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIPS_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FIPS_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FIPS_R64                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FIPS_R96                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "     \
  "%123, %124, %125, %126, %127"

// Operands after the kN / 2 accumulators: two descriptors, the flag, and the two transpose bits.
#define FIPS_WGMMA(n, type, registers, outputs, a_op, b_op, flag_op, ta_op, tb_op)           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " flag_op                               \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers \
               "}, " a_op ", " b_op ", add, 1, 1, " ta_op ", " tb_op ";\n}\n"                \
               : outputs                                                                     \
               : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajorA)),            \
                 "n"(static_cast<int>(kMajorB)))
#define FIPS_WGMMA_N64(type) \
  FIPS_WGMMA("64", type, FIPS_R0, FIPS_D32, "%32", "%33", "%34", "%35", "%36")
#define FIPS_WGMMA_N96(type) \
  FIPS_WGMMA("96", type, FIPS_R0 FIPS_R32, FIPS_D48, "%48", "%49", "%50", "%51", "%52")
#define FIPS_WGMMA_N128(type) \
  FIPS_WGMMA("128", type, FIPS_R0 FIPS_R32 FIPS_R48, FIPS_D64, "%64", "%65", "%66", "%67", "%68")
#define FIPS_WGMMA_N192(type)                                                                \
  FIPS_WGMMA("192", type, FIPS_R0 FIPS_R32 FIPS_R48 FIPS_R64, FIPS_D96, "%96", "%97", "%98", \
             "%99", "%100")
#define FIPS_WGMMA_N256(type)                                                                     \
  FIPS_WGMMA("256", type, FIPS_R0 FIPS_R32 FIPS_R48 FIPS_R64 FIPS_R96, FIPS_D128, "%128", "%129", \
             "%130", "%131", "%132")
#define FIPS_WGMMA_ALL(type)        \
  if constexpr (kN == 64) {         \
    FIPS_WGMMA_N64(type);           \
  } else if constexpr (kN == 96) {  \
    FIPS_WGMMA_N96(type);           \
  } else if constexpr (kN == 128) { \
    FIPS_WGMMA_N128(type);          \
  } else if constexpr (kN == 192) { \
    FIPS_WGMMA_N192(type);          \
  } else {                          \
    FIPS_WGMMA_N256(type);          \
  }

// A warpgroup starts d = (accumulate ? d : 0) + a * b: a 64x16 and b 16xkN in shared memory, given
// by descriptors; d spread over the warpgroup as mma_accumulator says, not to be touched before a
// wait.
template <class T, int kN, MmaMajor kMajorA, MmaMajor kMajorB>
FIPS_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256, "instantiated widths");
  if constexpr (std::is_same_v<T, BFloat16>) {
    FIPS_WGMMA_ALL("bf16")
  } else {
    FIPS_WGMMA_ALL("f16")
  }
}

#undef FIPS_F4
#undef FIPS_F16
#undef FIPS_F32
#undef FIPS_D32
#undef FIPS_D48
#undef FIPS_D64
#undef FIPS_D96
#undef FIPS_D128
#undef FIPS_R0
#undef FIPS_R32
#undef FIPS_R48
#undef FIPS_R64
#undef FIPS_R96
#undef FIPS_WGMMA
#undef FIPS_WGMMA_N64
#undef FIPS_WGMMA_N96
#undef FIPS_WGMMA_N128
#undef FIPS_WGMMA_N192
#undef FIPS_WGMMA_N256
#undef FIPS_WGMMA_ALL

}  // namespace fips::cuda

#endif  // FIPS_HOST_EMULATION
