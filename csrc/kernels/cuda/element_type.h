// From a run-time element type to the C++ type kernels are compiled for.
#pragma once

#include "core/check.h"
#include "core/types.h"

namespace fips::cuda {

// Calls body(T{}); `op` names the caller in the error for a type without CUDA kernels.
template <class F>
void with_element_type(const char* op, DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Half{});
    default:
      fail(op, ": ", dtype_name(dtype),
           " has no CUDA kernel; use float32, bfloat16 or float16, or run it on the CPU");
  }
}

}  // namespace fips::cuda
