// The seam between the entry point of Hopper's block_sparse_mm and the translation units that hold
// the kernels of one element type.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_heuristics.h"
#include "kernels/cuda/block_sparse_mm_sm90_task.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

struct Sm90Choice {
  Sm90Plan plan;
  bool transposed, gated;
  int out_edge;  // 64 or 128
};

template <class T>
void launch_sm90(const Sm90Choice& choice, const Sm90Task& task, Stream stream);

}  // namespace fips::cuda
