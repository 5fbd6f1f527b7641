// A barrier over the blocks of a grid that run at the same time (launch_together).
#pragma once

#include "kernels/cuda/common.cuh"

namespace fips::cuda {

// A block raises its own flag, flags[b] = nonce, and waits for all others: one store and one load
// away, with no counter that all blocks update in turn. Flags start with any content, since no two
// calls share a nonce; barriers of one call use different flags. A replayed graph repeats its
// nonce, so the flags of every barrier have to be cleared between their use in two replays
// (clear_flag): those of barrier 0 after barrier 1, and those of the others before barrier 0.
template <int kThreads>
FIPS_DEVICE void grid_barrier(uint64_t* flags, uint64_t nonce, int blocks) {
  block_barrier();
  if (thread_index() == 0) {
    store_release(flags + block_index(), nonce);
  }
  for (int other = thread_index(); other < blocks; other += kThreads) {
    while (load_acquire(flags + other) != nonce) {
      spin();
    }
  }
  block_barrier();
}

FIPS_DEVICE void clear_flag(uint64_t* flags) {
  if (thread_index() == 0) {
    flags[block_index()] = 0;
  }
}

}  // namespace fips::cuda
