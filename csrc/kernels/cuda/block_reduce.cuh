// Reductions over a thread block in a fixed order.
#pragma once

#include "kernels/cuda/ptx.cuh"

namespace fips::cuda {

struct Sum {
  template <class T>
  FIPS_DEVICE_MEMBER T operator()(T a, T b) const {
    return a + b;
  }
};

// Of magnitudes; a NaN is passed over.
struct Largest {
  template <class T>
  FIPS_DEVICE_MEMBER T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Every thread gets the reduction of all threads' `value`. kThreads: the block's threads, a power
// of two; `scratch`: as many elements of shared memory, free again afterwards.
template <int kThreads, class T, class Op>
FIPS_DEVICE T block_reduce(T* scratch, T value, Op op) {
  const int thread = thread_index();
  scratch[thread] = value;
  block_barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      scratch[thread] = op(scratch[thread], scratch[thread + half]);
    }
    block_barrier();
  }
  const T result = scratch[0];
  block_barrier();
  return result;
}

}  // namespace fips::cuda
