// The seam between the entry point and the translation units that hold the kernels of one element
// type, which are apart so that they compile in parallel.
#pragma once

#include "kernels/cuda/shared_mlp_decode_task.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Chooses task.slots for `max_shared_bytes` of shared memory a block, and starts task.blocks
// blocks. T: BFloat16, Half or float, each instantiated in a file of its own.
template <class T>
void launch_decode(DecodeTask task, int max_shared_bytes, Stream stream);

}  // namespace fips::cuda
