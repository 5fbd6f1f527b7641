// The seam between the entry point and the translation units that hold the kernels of one element
// type, which are apart so that they compile in parallel.
#pragma once

#include "kernels/cuda/block_sparse_mm_task.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

struct MmChoice {
  bool transposed;
  bool bitmap;
  int out_edge;    // block edge along the outputs: 16, 32, 64 or 128
  int token_tile;  // 16, 64 or 128 (block_sparse_mm_heuristics.h)
  bool tf32;       // float32 on tensor cores
};

// T: BFloat16, Half or float, each instantiated in a file of its own.
template <class T>
void launch_mm(const MmChoice& choice, const MmTask& task, Stream stream);

}  // namespace fips::cuda
