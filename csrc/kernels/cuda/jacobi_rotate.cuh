// The sweeps: thread blocks hold two groups of rows in shared memory and rotate pairs of them, a
// warp per pair, a barrier per round. Per element of a pair: about 2.5 reads, 2 writes (16 bytes a
// lane, no bank conflicts) and 7 FMAs, so shared-memory bandwidth is what a round costs: 16 rows of
// 784 floats take some 900 clocks, as long as the chain of shuffles, division and roots they hide.
#pragma once

#include "kernels/cuda/jacobi_math.cuh"
#include "kernels/cuda/jacobi_task.h"

namespace fips::cuda {

// The rows that a block holds: those of group `a`, then those of group `b`.
struct HeldRows {
  int first_a, count_a, first_b, count_b;
};

template <class T>
FIPS_DEVICE HeldRows held_rows(const JacobiTask<T>& task, int pair) {
  const JacobiPlan& plan = task.plan;
  const RowPair groups = tournament_pair(plan.groups, task.round, pair);
  const int first_a = groups.first * plan.group, first_b = groups.second * plan.group;
  return {first_a, elements_below(first_a, task.vectors, plan.group), first_b,
          elements_below(first_b, task.vectors, plan.group)};
}

template <class T>
FIPS_DEVICE Chunk<T>* row_in(Chunk<T>* base, const JacobiTask<T>& task, int row) {
  return base + static_cast<int64_t>(row) * (task.plan.stride / Chunk<T>::kSize);
}

template <class T>
FIPS_DEVICE void load_rows(const JacobiTask<T>& task, const HeldRows& held, Chunk<T>* tile,
                           Chunk<T>* rows) {
  const int chunks = task.plan.stride / Chunk<T>::kSize, threads = task.plan.warps * kWarpSize;
  for (int i = thread_index(); i < (held.count_a + held.count_b) * chunks; i += threads) {
    const int row = i / chunks;
    const int from = row < held.count_a ? held.first_a + row : held.first_b + row - held.count_a;
    cp_async_16(shared_address(tile + i), row_in(rows, task, from) + i % chunks, kChunkBytes);
  }
  cp_async_commit();
  cp_async_wait<0>();
  block_barrier();
}

template <class T>
FIPS_DEVICE void store_rows(const JacobiTask<T>& task, const HeldRows& held, const Chunk<T>* tile,
                            Chunk<T>* rows) {
  const int chunks = task.plan.stride / Chunk<T>::kSize, threads = task.plan.warps * kWarpSize;
  for (int i = thread_index(); i < (held.count_a + held.count_b) * chunks; i += threads) {
    const int row = i / chunks;
    const int to = row < held.count_a ? held.first_a + row : held.first_b + row - held.count_a;
    row_in(rows, task, to)[i % chunks] = tile[i];
  }
}

// Every pair of the rows held, inside the groups and between them. True if this warp rotated any.
template <class T>
FIPS_DEVICE bool rotate_all(const JacobiTask<T>& task, const HeldRows& held, Chunk<T>* tile,
                            T null_square) {
  const int count = held.count_a + held.count_b, players = count + count % 2;
  bool rotated = false;
  for (int round = 0; round < players - 1; ++round) {
    for (int i = warp_index(); i < players / 2; i += task.plan.warps) {
      const RowPair pair = tournament_pair(players, round, i);
      if (pair.first < count && pair.second < count) {
        rotated |= rotate_rows(row_in(tile, task, pair.first), row_in(tile, task, pair.second),
                               task.plan.padded_length / Chunk<T>::kSize,
                               task.plan.stride / Chunk<T>::kSize, null_square, task.tolerance);
      }
    }
    block_barrier();
  }
  return rotated;
}

// Every pair of a row of one group and a row of the other.
template <class T>
FIPS_DEVICE bool rotate_across(const JacobiTask<T>& task, const HeldRows& held, Chunk<T>* tile,
                               T null_square) {
  bool rotated = false;
  for (int round = 0; round < task.plan.group; ++round) {
    for (int i = warp_index(); i < held.count_a; i += task.plan.warps) {
      const RowPair pair = cross_pair(task.plan.group, round, i);
      if (pair.second < held.count_b) {
        rotated |= rotate_rows(row_in(tile, task, pair.first),
                               row_in(tile, task, held.count_a + pair.second),
                               task.plan.padded_length / Chunk<T>::kSize,
                               task.plan.stride / Chunk<T>::kSize, null_square, task.tolerance);
      }
    }
    block_barrier();
  }
  return rotated;
}

template <class T>
FIPS_DEVICE Chunk<T>* matrix_rows(const JacobiTask<T>& task, int64_t matrix) {
  return reinterpret_cast<Chunk<T>*>(task.rows + matrix * task.vectors * task.plan.stride);
}

// All sweeps of one matrix per block.
template <class T>
FIPS_KERNEL(kJacobiWarps* kWarpSize, 1)
jacobi_resident_kernel(const JacobiTask<T> task) {
  Chunk<T>* const tile = reinterpret_cast<Chunk<T>*>(dynamic_shared_memory());
  Chunk<T>* const rows = matrix_rows(task, block_index());
  const T null_square = static_cast<T>(task.states[block_index()].null_square);
  const HeldRows held{0, task.vectors, task.vectors, 0};
  load_rows(task, held, tile, rows);
  for (int sweep = 0; sweep < task.plan.sweeps; ++sweep) {
    if (!block_any(rotate_all(task, held, tile, null_square))) {
      break;
    }
  }
  store_rows(task, held, tile, rows);
}

// One round of the tournament of groups; the first round of a sweep also meets the pairs inside the
// groups. Does nothing once a sweep has found nothing to rotate.
template <class T>
FIPS_KERNEL(kJacobiWarps* kWarpSize, 1)
jacobi_round_kernel(const JacobiTask<T> task) {
  const int64_t matrix = block_index() / (task.plan.groups / 2);
  int32_t* const rotated = task.rotated + matrix * task.plan.sweeps + task.sweep;
  if (task.sweep > 0 && rotated[-1] == 0) {
    return;
  }
  Chunk<T>* const tile = reinterpret_cast<Chunk<T>*>(dynamic_shared_memory());
  Chunk<T>* const rows = matrix_rows(task, matrix);
  const T null_square = static_cast<T>(task.states[matrix].null_square);
  const HeldRows held = held_rows(task, static_cast<int>(block_index() % (task.plan.groups / 2)));
  load_rows(task, held, tile, rows);
  const bool changed = task.round == 0 ? rotate_all(task, held, tile, null_square)
                                       : rotate_across(task, held, tile, null_square);
  if (block_any(changed)) {
    store_rows(task, held, tile, rows);
    if (thread_index() == 0) {
      *rotated = 1;  // by several blocks, the same value
    }
  }
}

}  // namespace fips::cuda
