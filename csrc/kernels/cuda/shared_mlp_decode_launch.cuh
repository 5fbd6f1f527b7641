// From the description of a call to the kernel compiled for it.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/shared_mlp_decode_kernel.cuh"
#include "kernels/cuda/shared_mlp_decode_launch.h"

namespace fips::cuda {

template <class T, int kTokens>
void launch_decode_tokens(DecodeTask task, int max_shared_bytes, Stream stream) {
  using Shared = DecodeShared<T, kTokens>;
  task.slots = 0;
  for (const int slots : {5, 4, 3, 2}) {  // those of wait_for_step
    if (Shared::bytes(slots, task.bitmap) <= max_shared_bytes) {
      task.slots = slots;
      break;
    }
  }
  FIPS_CHECK(task.slots > 0, "shared_mlp_decode: needs ", Shared::bytes(2, task.bitmap),
             " bytes of shared memory, but a block of this device has ", max_shared_bytes);
  launch_together<shared_mlp_decode_kernel<T, kTokens>>(
      "shared_mlp_decode", {task.blocks, kDecodeThreads, Shared::bytes(task.slots, task.bitmap)},
      task, stream);
}

template <class T>
void launch_decode(DecodeTask task, int max_shared_bytes, Stream stream) {
  task.tokens <= 8 ? launch_decode_tokens<T, 8>(task, max_shared_bytes, stream)
                   : launch_decode_tokens<T, 16>(task, max_shared_bytes, stream);
}

}  // namespace fips::cuda
