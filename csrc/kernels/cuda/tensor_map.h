// Descriptions of 2-D tensors for the bulk tensor copy engine (TMA), made on the host and passed to
// kernels inside a __grid_constant__ parameter.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace fips::cuda {

// [rows, cols] elements, cols contiguous, rows `stride` elements apart, moved in boxes of
// [box_rows, box_cols] with 128-byte swizzle.
struct TensorMapShape {
  DType dtype;  // bfloat16 or float16
  int64_t rows, cols, stride;
  int box_rows, box_cols;
};

#if defined(FIPS_HOST_EMULATION)

struct TensorMap {
  unsigned char* base;
  TensorMapShape shape;
};

#else

struct alignas(128) TensorMap {
  unsigned char opaque[128];  // CUtensorMap, aligned as CUDA 13 asks (64 bytes before)
};

#endif

// What the copy engine accepts (CUDA driver API, cuTensorMapEncodeTiled): address and row stride
// multiples of 16 bytes, stride below 2^40 bytes, sizes in [1, 2^32], coordinates are int32.
bool tensor_map_accepts(const void* base, int64_t rows, int64_t cols, int64_t stride);

// Throws unless tensor_map_accepts, box_cols spans 128 bytes and box_rows lies in [1, 256].
// Elements outside the tensor are read as zeros and not written. Host only; no synchronisation.
TensorMap make_tensor_map(const void* base, const TensorMapShape& shape);

}  // namespace fips::cuda
