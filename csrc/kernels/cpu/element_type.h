// From a run-time element type to a compile-time one.
#pragma once

#include "core/types.h"

namespace fips::cpu {
namespace {

// Calls body(value of the element type) and returns its result.
template <class F>
FIPS_INLINE auto with_element_type(DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Half{});
    default:
      return body(float{});
  }
}

}  // namespace
}  // namespace fips::cpu
