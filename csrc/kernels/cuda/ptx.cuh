// Everything the kernels ask of the hardware beyond C++: thread and warp primitives, asynchronous
// copies, tensor-core instructions (sm_80 and later). With FIPS_HOST_EMULATION the same functions
// come from emulation.h and the same kernel source runs on the CPU.
#pragma once

#include <cstdint>

#include "core/types.h"

#if defined(FIPS_HOST_EMULATION)

#include "kernels/cuda/emulation.h"

#else

#define FIPS_DEVICE static __device__ __forceinline__
#define FIPS_DEVICE_MEMBER __device__ __forceinline__
#define FIPS_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define FIPS_UNROLL _Pragma("unroll")
#define FIPS_UNROLL_BY(count) FIPS_PRAGMA(unroll count)
#define FIPS_PRAGMA(text) _Pragma(#text)

namespace fips::cuda {

// ---- threads
// -------------------------------------------------------------------------------------

FIPS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FIPS_DEVICE int64_t block_index() { return blockIdx.x; }
FIPS_DEVICE void block_barrier() { __syncthreads(); }

// A barrier that tells every thread whether `value` is true in any of them.
FIPS_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }

FIPS_DEVICE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char fips_shared_memory[];
  return fips_shared_memory;
}

// The value of `source` lane; every lane of the warp takes part.
FIPS_DEVICE uint32_t shuffle(uint32_t value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// Adds each of `values` up over the warp, always in the same order; every lane gets the same sums.
template <class T, int kCount>
FIPS_DEVICE void warp_sums(T (&values)[kCount]) {
  FIPS_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    FIPS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
    }
  }
}

// Orders the warp's accesses to memory before and after it.
FIPS_DEVICE void warp_barrier() { __syncwarp(); }

FIPS_DEVICE int popcount(uint32_t bits) { return __popc(bits); }

// ---- between thread blocks that run at the same time
// ---------------------------------------------

FIPS_DEVICE uint64_t load_acquire(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(word) : "memory");
  return value;
}

FIPS_DEVICE void store_release(uint64_t* word, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;\n" ::"l"(word), "l"(value) : "memory");
}

// Inside a loop that waits for another block. The hardware needs nothing; emulation runs the
// others.
FIPS_DEVICE void spin() {}

// A hint: the 128-byte line of `source`, any address, will be read.
FIPS_DEVICE void prefetch_l2(const void* source) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(source));
}

// ---- copies to shared memory
// ---------------------------------------------------------------------

using SharedAddress = uint32_t;

FIPS_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, of which the first `bytes` come from `source` (16-byte aligned) and the rest are zeros.
FIPS_DEVICE void cp_async_16(SharedAddress target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target),
               "l"(source), "r"(bytes)
               : "memory");
}

FIPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
FIPS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- tensor cores
// --------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FIPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

FIPS_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements spread over the warp, two elements a lane.
FIPS_DEVICE uint32_t movmatrix_transposed(uint32_t value) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(value));
  return result;
}

// d += a * b for a 16x16 (row-major), b 16x8 (column-major) and d 16x8, spread over the warp.
template <class T>
FIPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// float32 rounded to the 10 mantissa bits that the tensor cores read, as bits.
FIPS_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// The same for 8 reduction positions of TF32: a 16x8 (row-major), b 8x8 (column-major).
FIPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic
// ----------------------------------------------------------------------------------

// Within 2 units in the last place for moderate x.
FIPS_DEVICE float fast_exp(float x) { return __expf(x); }
FIPS_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- element types
// -------------------------------------------------------------------------------

FIPS_DEVICE float to_float(float x) { return x; }
FIPS_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
FIPS_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round to nearest, ties to even.
template <class T>
FIPS_DEVICE T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

}  // namespace fips::cuda

#endif  // FIPS_HOST_EMULATION
