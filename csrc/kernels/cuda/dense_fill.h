// CUDA implementation of kernels/dense_fill.h, for float32, bfloat16 and float16.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/dense_fill.h"

namespace fips::cuda {

void fill_dense_transposed(const BlockSparseView& v, void* out, Stream stream);
void gather_stored(const GatherParams& params, Stream stream);

// out[i] = value of the i-th code of a quantised slice, in the type of v: packed like the codes.
void dequantise(const BlockSparseView& v, void* out, Stream stream);

}  // namespace fips::cuda
