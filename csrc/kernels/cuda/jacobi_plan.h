// Which rows meet when, and how the work is cut into thread blocks: plain functions, unit-tested.
//
// One rotation makes two rows orthogonal; a sweep does this once for every pair. Rows that meet at
// the same time must be disjoint, so a sweep is a round-robin tournament. Cost: a rotation reads
// and writes its two rows, so a matrix that fits in shared memory stays there for all sweeps, a
// thread block per matrix (float32 with left vectors: up to 170 rows in 227 KiB). A larger one is
// cut into groups of rows, and a tournament of groups, one launch per round, brings every two
// groups into one block's shared memory: with groups of c rows, every row moves to and from L2 once
// for c rounds of rotations, and a single matrix keeps `groups / 2` multiprocessors busy.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/types.h"
#include "kernels/cuda/device_info.h"

namespace fips::cuda {

inline constexpr int kJacobiWarps = 16;

struct RowPair {
  int first, second;
};

// Pair `index` of n / 2 in round `round` of n - 1 of a tournament of n players (even), by the
// circle method: the last player stays, the others move on by one each round.
FIPS_INLINE FIPS_HOST_DEVICE RowPair tournament_pair(int players, int round, int index) {
  const int circle = players - 1;
  if (index == 0) {
    return {round, circle};
  }
  return {(round + index) % circle, (round + circle - index) % circle};
}

// Pair `index` in round `round` of all pairs between two groups of `size`.
FIPS_INLINE FIPS_HOST_DEVICE RowPair cross_pair(int size, int round, int index) {
  return {index, (index + round) % size};
}

struct JacobiPlan {
  int padded_length;  // elements of a row, rounded up to 16 bytes
  int stride;         // the same with the row of the left factor
  int group;          // rows in a group; the last groups may be short or empty
  int groups;         // even; 2: the whole matrix is resident in one block's shared memory
  int warps;          // of a thread block that rotates
  int shared_bytes;   // of the same
  int sweeps;         // at most
};

// Sweeps until nothing is left to rotate are 6 to 10 on spectra of weights, up to 20 (float32) on
// graded or rank-deficient input. Launches of sweeps that are not needed end at once.
inline int jacobi_max_sweeps(DType dtype) { return dtype == DType::kFloat64 ? 36 : 24; }

// {0, ...}: not even two rows fit in shared memory.
inline JacobiPlan plan_jacobi(int64_t batch, int vectors, int length, bool left, DType dtype,
                              const DeviceInfo& device) {
  const int size = static_cast<int>(element_size(dtype)), step = 16 / size;
  JacobiPlan plan{};
  plan.padded_length = static_cast<int>(round_up(length, step));
  plan.stride = plan.padded_length + (left ? static_cast<int>(round_up(vectors, step)) : 0);
  plan.sweeps = jacobi_max_sweeps(dtype);
  const int row_bytes = plan.stride * size, rows = device.max_shared_bytes / row_bytes;
  if (rows < 2 && vectors > 1) {
    return {};
  }
  if (vectors <= rows) {
    plan.groups = 2;
    plan.group = (vectors + 1) / 2;
  } else {
    // Small groups spread one matrix over many multiprocessors, large ones save traffic once a
    // batch fills them anyway. At 8 rows a block's rotations take as long as moving its rows.
    constexpr int64_t kSmallGroup = 8;
    const int64_t filling = batch * vectors / (2 * device.sm_count);
    const int64_t group = min_of(max_of(filling, kSmallGroup), rows / 2);
    plan.groups = static_cast<int>(round_up(ceil_div(vectors, group), 2));
    plan.group = static_cast<int>(ceil_div(vectors, plan.groups));
  }
  plan.warps = plan.group < kJacobiWarps ? plan.group : kJacobiWarps;
  plan.shared_bytes = (vectors <= rows ? vectors : 2 * plan.group) * row_bytes;
  return plan;
}

}  // namespace fips::cuda
