// After the sweeps: the norms of the rows are the singular values. Sorts them, normalises the rows
// and completes those of rank-deficient matrices.
#pragma once

#include "kernels/cuda/jacobi_math.cuh"
#include "kernels/cuda/jacobi_task.h"

namespace fips::cuda {

inline constexpr int kJacobiFinishWarps = 16;
inline constexpr int kJacobiFinishThreads = kJacobiFinishWarps * kWarpSize;

// Shared memory of one block.
template <class T>
struct FinishMemory {
  T* norm;         // [vectors] of the rows, in the workspace's order
  T* coefficient;  // [vectors]
  T* candidate;    // [length]
  T* energy;       // [length]: squared norms of the columns of the finished rows
  int* order;      // [vectors]: the row that comes k-th

  static int bytes(int vectors, int length) {
    return static_cast<int>(sizeof(T)) * 2 * (vectors + length) +
           static_cast<int>(sizeof(int)) * vectors;
  }

  FIPS_DEVICE_MEMBER FinishMemory(unsigned char* memory, int vectors, int length)
      : norm(reinterpret_cast<T*>(memory)),
        coefficient(norm + vectors),
        candidate(coefficient + vectors),
        energy(candidate + length),
        order(reinterpret_cast<int*>(energy + length)) {}
};

template <class T>
FIPS_DEVICE T warp_dot(const T* a, const T* b, int count) {
  T sum[1] = {};
  for (int i = lane_index(); i < count; i += kWarpSize) {
    sum[0] += a[i] * b[i];
  }
  warp_sums(sum);
  return sum[0];
}

// Each row's place is the number of rows that come before it. NaNs come last.
template <class T>
FIPS_DEVICE void sort_rows(const FinishMemory<T>& memory, int vectors) {
  for (int i = thread_index(); i < vectors; i += kJacobiFinishThreads) {
    const T mine = memory.norm[i] >= 0 ? memory.norm[i] : T(-1);
    int place = 0;
    for (int j = 0; j < vectors; ++j) {
      const T other = memory.norm[j] >= 0 ? memory.norm[j] : T(-1);
      place += other > mine || (other == mine && j < i);
    }
    memory.order[place] = i;
  }
}

template <class T>
FIPS_DEVICE void write_normalised(T* out, const T* row, int count, T norm) {
  for (int i = lane_index(); i < count; i += kWarpSize) {
    out[i] = row[i] / norm;
  }
}

// Takes the parts along the first `rows` rows of `basis` out of memory.candidate.
template <class T>
FIPS_DEVICE void project_out(const FinishMemory<T>& memory, const T* basis, int rows, int length) {
  for (int j = warp_index(); j < rows; j += kJacobiFinishWarps) {
    const T along = warp_dot(basis + static_cast<int64_t>(j) * length, memory.candidate, length);
    if (lane_index() == 0) {
      memory.coefficient[j] = along;
    }
  }
  block_barrier();
  for (int i = thread_index(); i < length; i += kJacobiFinishThreads) {
    T value = memory.candidate[i];
    for (int j = 0; j < rows; ++j) {
      value -= memory.coefficient[j] * basis[static_cast<int64_t>(j) * length + i];
    }
    memory.candidate[i] = value;
  }
  block_barrier();
}

// Rows from `live` on become an orthonormal complement: from the unit vector that the rows so far
// reach least, whose rest has a squared norm of at least 1 / length, by Gram-Schmidt twice (enough:
// Giraud, Langou, Rozloznik, Comput. Math. Appl. 2005). Needs a barrier before.
template <class T>
FIPS_DEVICE void complete_basis(const FinishMemory<T>& memory, T* basis, int live, int vectors,
                                int length) {
  for (int i = thread_index(); i < length; i += kJacobiFinishThreads) {
    T energy = 0;
    for (int j = 0; j < live; ++j) {
      const T element = basis[static_cast<int64_t>(j) * length + i];
      energy += element * element;
    }
    memory.energy[i] = energy;
  }
  for (int k = live; k < vectors; ++k) {
    block_barrier();
    int least = 0;
    for (int i = 1; i < length; ++i) {
      least = memory.energy[i] < memory.energy[least] ? i : least;
    }
    for (int i = thread_index(); i < length; i += kJacobiFinishThreads) {
      memory.candidate[i] = static_cast<T>(i == least);
    }
    block_barrier();
    project_out(memory, basis, k, length);
    project_out(memory, basis, k, length);
    const T norm = square_root(warp_dot(memory.candidate, memory.candidate, length));
    for (int i = thread_index(); i < length; i += kJacobiFinishThreads) {
      const T element = memory.candidate[i] / norm;
      basis[static_cast<int64_t>(k) * length + i] = element;
      memory.energy[i] += element * element;
    }
  }
}

// One block per matrix.
template <class T>
FIPS_KERNEL(kJacobiFinishThreads, 1)
jacobi_finish_kernel(const JacobiTask<T> task) {
  const int64_t matrix = block_index();
  const int vectors = task.vectors, length = task.length, stride = task.plan.stride;
  const FinishMemory<T> memory(dynamic_shared_memory(), vectors, length);
  const T* const rows = task.rows + matrix * vectors * stride;
  T* const right = task.right + matrix * vectors * length;
  for (int i = warp_index(); i < vectors; i += kJacobiFinishWarps) {
    const T* const row = rows + static_cast<int64_t>(i) * stride;
    const T square = warp_dot(row, row, length);
    if (lane_index() == 0) {
      memory.norm[i] = square_root(square);
    }
  }
  block_barrier();
  sort_rows(memory, vectors);
  block_barrier();
  // Twice what the sweeps took for zero: rows near that bound need not be orthogonal.
  const T null = 2 * square_root(static_cast<T>(task.states[matrix].null_square));
  const T scale = static_cast<T>(task.states[matrix].scale);
  for (int k = warp_index(); k < vectors; k += kJacobiFinishWarps) {
    const int i = memory.order[k];
    const T* const row = rows + static_cast<int64_t>(i) * stride;
    if (memory.norm[i] > null) {
      write_normalised(right + static_cast<int64_t>(k) * length, row, length, memory.norm[i]);
    }
    if (task.left != nullptr) {
      const T* const left = row + task.plan.padded_length;
      // A product of rotations, of norm 1 but for the rounding of thousands of them.
      write_normalised(task.left + (matrix * vectors + k) * vectors, left, vectors,
                       square_root(warp_dot(left, left, vectors)));
    }
    if (lane_index() == 0) {
      task.values[matrix * vectors + k] = memory.norm[i] * scale;
    }
  }
  int live = 0;
  while (live < vectors && memory.norm[memory.order[live]] > null) {
    ++live;
  }
  block_barrier();
  if (live < vectors) {
    complete_basis(memory, right, live, vectors, length);
  }
}

}  // namespace fips::cuda
