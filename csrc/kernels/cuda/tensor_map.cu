#include <limits>

#include "core/check.h"
#include "kernels/cuda/sm90_layout.h"
#include "kernels/cuda/tensor_map.h"

#if !defined(FIPS_HOST_EMULATION)
#include <cuda.h>

#include "kernels/cuda/cuda_check.cuh"
#endif

namespace fips::cuda {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;
constexpr int kMaxBoxRows = 256;

void check_shape(const void* base, const TensorMapShape& shape) {
  FIPS_CHECK(shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16,
             "tensor map: dtype is ", dtype_name(shape.dtype),
             "; allowed are bfloat16 and float16");
  FIPS_CHECK(
      tensor_map_accepts(base, shape.rows, shape.cols, shape.stride), "tensor map: a [", shape.rows,
      ", ", shape.cols, "] tensor with ", shape.stride, " elements between rows at ", base,
      " is not what the copy engine takes: address and stride must be multiples of 16 bytes");
  FIPS_CHECK(shape.box_cols * kElementBytes == kSwizzleRowBytes && shape.box_rows >= 1 &&
                 shape.box_rows <= kMaxBoxRows,
             "tensor map: the box is [", shape.box_rows, ", ", shape.box_cols,
             "]; its rows must span 128 bytes and number 1 to 256");
}

}  // namespace

bool tensor_map_accepts(const void* base, int64_t rows, int64_t cols, int64_t stride) {
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - kMaxBoxRows;
  return base != nullptr && reinterpret_cast<uintptr_t>(base) % kAlignment == 0 && rows >= 1 &&
         rows <= kMaxSize && cols >= 1 && cols <= kMaxSize && stride >= cols &&
         stride * kElementBytes % kAlignment == 0 && stride < kMaxStrideBytes / kElementBytes;
}

#if defined(FIPS_HOST_EMULATION)

TensorMap make_tensor_map(const void* base, const TensorMapShape& shape) {
  check_shape(base, shape);
  return {static_cast<unsigned char*>(const_cast<void*>(base)), shape};
}

#else

namespace {

using EncodeTiled = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                             const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                             const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime, so that the library does not link (and loads without) the driver.
EncodeTiled* find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kSince = 12000;  // the driver API version that introduced it
  FIPS_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                                   cudaEnableDefault, &found));
  FIPS_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
             "CUDA: the driver has no cuTensorMapEncodeTiled; update it to 525 or later");
  return reinterpret_cast<EncodeTiled*>(function);
}

// Unlike the runtime's calls, the driver's do not make a context for a thread that has none, as one
// of autograd's may: torch sets the device only where it differs from the current one.
void make_context_current() {
  thread_local int current = -1;
  int device = 0;
  FIPS_CUDA_CHECK(cudaGetDevice(&device));
  if (device != current) {
    FIPS_CUDA_CHECK(cudaSetDevice(device));
    current = device;
  }
}

}  // namespace

TensorMap make_tensor_map(const void* base, const TensorMapShape& shape) {
  static_assert(
      sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
      "the opaque form");
  make_context_current();
  static EncodeTiled* const encode = find_encode_tiled();
  check_shape(base, shape);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.cols),
                              static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(shape.stride * kElementBytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(shape.box_cols),
                            static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUtensorMapDataType type = shape.dtype == DType::kBFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  TensorMap map;
  const CUresult status =
      encode(reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(base), sizes, strides,
             box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FIPS_CHECK(status == CUDA_SUCCESS, "CUDA: cuTensorMapEncodeTiled failed with code ",
             static_cast<int>(status), " for a [", shape.rows, ", ", shape.cols, "] tensor with ",
             shape.stride, " elements between rows and boxes of [", shape.box_rows, ", ",
             shape.box_cols, "]");
  return map;
}

#endif

}  // namespace fips::cuda
