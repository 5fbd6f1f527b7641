// How blocks of a grid that run at the same time (launch_together) wait for each other.
//
// A block raises its own flag, flags[b] = nonce, and others poll it: one store and one load away,
// with no counter that all blocks update in turn. Flags start with any content, since no two calls
// share a nonce, and are used for one purpose only. A replayed graph repeats its nonce, so flags
// have to be cleared between their use in two replays: at a point that every block reaches after
// all polling of this run, or before a barrier of the next run that precedes its polling.
#pragma once

#include "kernels/cuda/common.cuh"

namespace fips::cuda {

// Publishes what all threads of the block have written.
FIPS_DEVICE void raise_flag(uint64_t* flags, uint64_t nonce) {
  block_barrier();
  if (thread_index() == 0) {
    store_release(flags + block_index(), nonce);
  }
}

FIPS_DEVICE void clear_flag(uint64_t* flags) {
  if (thread_index() == 0) {
    flags[block_index()] = 0;
  }
}

// Until blocks first ... first + count - 1 have raised theirs.
template <int kThreads>
FIPS_DEVICE void wait_for_flags(const uint64_t* flags, uint64_t nonce, int first, int count) {
  FIPS_UNROLL_BY(1)
  for (int i = thread_index(); i < count; i += kThreads) {
    FIPS_UNROLL_BY(1)
    while (load_acquire(flags + first + i) != nonce) {
      spin();
    }
  }
  block_barrier();
}

template <int kThreads>
FIPS_DEVICE void grid_barrier(uint64_t* flags, uint64_t nonce, int blocks) {
  raise_flag(flags, nonce);
  wait_for_flags<kThreads>(flags, nonce, 0, blocks);
}

}  // namespace fips::cuda
