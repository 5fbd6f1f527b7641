// ptx.cuh on the CPU: the instructions that kernels use, for threads that emulation_block.h runs.
// Asynchronous copies happen as late as the program allows, so that a missing wait shows.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/types.h"
#include "kernels/cuda/emulation_block.h"

#define FIPS_DEVICE static inline
#define FIPS_DEVICE_MEMBER
#define FIPS_KERNEL(threads, min_blocks) void
#define FIPS_UNROLL
#define FIPS_UNROLL_BY(count)

namespace fips::cuda {

// ---- threads ------------------------------------------------------------------------------------

FIPS_DEVICE int thread_index() { return emulation::Block::current()->thread; }
FIPS_DEVICE int64_t block_index() { return emulation::Block::current()->index; }
FIPS_DEVICE void block_barrier() { emulation::Block::current()->barrier(); }
FIPS_DEVICE bool block_any(bool value) { return emulation::Block::current()->any(value); }
FIPS_DEVICE unsigned char* dynamic_shared_memory() { return emulation::Block::current()->shared(); }

FIPS_DEVICE uint32_t shuffle(uint32_t value, int source) {
  return emulation::Block::current()->exchange(value)[source % emulation::kLanes];
}

namespace emulation {

template <class T, int kCount>
struct Values {
  T value[kCount];
};

}  // namespace emulation

// In the order of the butterfly on the device, in which lanes l and l ^ step hold equal sums.
template <class T, int kCount>
FIPS_DEVICE void warp_sums(T (&values)[kCount]) {
  emulation::Values<T, kCount> mine;
  memcpy(mine.value, values, sizeof values);
  auto lanes = emulation::Block::current()->exchange(mine);
  for (int step = emulation::kLanes / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) {
      for (int i = 0; i < kCount; ++i) {
        lanes[lane].value[i] += lanes[lane + step].value[i];
      }
    }
  }
  memcpy(values, lanes[0].value, sizeof values);
}

// Orders the warp's accesses to memory before and after it.
FIPS_DEVICE void warp_barrier() { emulation::Block::current()->exchange(0); }

FIPS_DEVICE int popcount(uint32_t bits) { return __builtin_popcount(bits); }

// ---- between thread blocks that run at the same time --------------------------------------------

FIPS_DEVICE uint64_t load_acquire(const uint64_t* word) { return *word; }
FIPS_DEVICE void store_release(uint64_t* word, uint64_t value) { *word = value; }
FIPS_DEVICE void spin() { emulation::Block::current()->yield(); }

FIPS_DEVICE void prefetch_l2(const void*) {}

// ---- copies to shared memory --------------------------------------------------------------------

using SharedAddress = uintptr_t;

namespace emulation {

inline void perform(const Copy& copy) {
  memset(copy.target, 0, 16);
  memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
}

}  // namespace emulation

FIPS_DEVICE SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}

FIPS_DEVICE void cp_async_16(SharedAddress target, const void* source, int bytes) {
  FIPS_CHECK(target % 16 == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0,
             "emulation: cp.async of 16 bytes between unaligned addresses");
  emulation::Block::current()->fibre().open_group.push_back(
      {reinterpret_cast<unsigned char*>(target), static_cast<const unsigned char*>(source), bytes});
}

FIPS_DEVICE void cp_async_commit() {
  emulation::Fibre& fibre = emulation::Block::current()->fibre();
  fibre.groups.push_back(std::move(fibre.open_group));
  fibre.open_group.clear();
}

template <int kPending>
FIPS_DEVICE void cp_async_wait() {
  auto& groups = emulation::Block::current()->fibre().groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) {
      emulation::perform(copy);
    }
    groups.pop_front();
  }
}

// ---- tensor cores -------------------------------------------------------------------------------

namespace emulation {

struct Operands {
  uint32_t a[4], b[2];
};

FIPS_DEVICE uint16_t half_of(uint32_t word, int which) {
  return static_cast<uint16_t>(word >> (16 * which));
}

// Element (row, k) of A and (k, column) of B, from the lane and register that hold it.
template <class T>
FIPS_DEVICE float a_element(const std::array<Operands, kLanes>& lanes, int row, int k) {
  const Operands& lane = lanes[row % 8 * 4 + k % 8 / 2];
  return to_accumulator(T{half_of(lane.a[row / 8 + k / 8 * 2], k % 2)});
}
template <class T>
FIPS_DEVICE float b_element(const std::array<Operands, kLanes>& lanes, int k, int column) {
  const Operands& lane = lanes[column * 4 + k % 8 / 2];
  return to_accumulator(T{half_of(lane.b[k / 8], k % 2)});
}

FIPS_DEVICE uint16_t load_half(SharedAddress row, int column) {
  uint16_t bits;
  memcpy(&bits, reinterpret_cast<const unsigned char*>(row) + 2 * column, sizeof bits);
  return bits;
}

FIPS_DEVICE void ldmatrix(uint32_t (&r)[4], SharedAddress row, bool transpose) {
  FIPS_CHECK(row % 16 == 0, "emulation: ldmatrix reads rows of 16 aligned bytes");
  const std::array<SharedAddress, kLanes> rows = Block::current()->exchange(row);
  const int lane = Block::current()->thread % kLanes, outer = lane / 4, inner = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      pair[i] = transpose ? load_half(rows[matrix * 8 + inner + i], outer)
                          : load_half(rows[matrix * 8 + outer], inner + i);
    }
    r[matrix] = pair[0] | pair[1] << 16;
  }
}

}  // namespace emulation

FIPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  emulation::ldmatrix(r, row, false);
}
FIPS_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  emulation::ldmatrix(r, row, true);
}

FIPS_DEVICE uint32_t movmatrix_transposed(uint32_t value) {
  auto* block = emulation::Block::current();
  const auto rows =
      block->exchange(value);  // lane l holds row l / 4, columns 2 (l % 4) and one more
  const int row = block->thread % emulation::kLanes / 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const int column = block->thread % 4 * 2 + i;
    result |= uint32_t{emulation::half_of(rows[column * 4 + row / 2], row % 2)} << (16 * i);
  }
  return result;
}

template <class T>
FIPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto* block = emulation::Block::current();
  const auto lanes = block->exchange(emulation::Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = block->thread % emulation::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      d[i] += emulation::a_element<T>(lanes, row, k) * emulation::b_element<T>(lanes, k, column);
    }
  }
}

// Round to nearest, ties away from zero.
FIPS_DEVICE uint32_t to_tf32(uint32_t bits) { return (bits + 0x1000u) & ~0x1fffu; }

FIPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto* block = emulation::Block::current();
  const auto lanes = block->exchange(emulation::Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto value = [](uint32_t bits) {
    FIPS_CHECK((bits & 0x1fffu) == 0, "emulation: an operand that is not rounded to TF32");
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  };
  const int lane = block->thread % emulation::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      d[i] += value(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) *
              value(lanes[column * 4 + k % 4].b[k / 4]);
    }
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------

FIPS_DEVICE float fast_exp(float x) { return expf(x); }
FIPS_DEVICE float fast_reciprocal(float x) { return 1.0f / x; }

// ---- element types ------------------------------------------------------------------------------

template <class T>
FIPS_DEVICE float to_float(T x) {
  return to_accumulator(x);
}
template <class T>
FIPS_DEVICE T from_float(float x) {
  return FromAccumulator<T>::convert(x);
}

}  // namespace fips::cuda
