#pragma once

#include <cstdint>

#include "core/types.h"

namespace fips {

FIPS_INLINE FIPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
FIPS_INLINE FIPS_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
FIPS_INLINE FIPS_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FIPS_INLINE FIPS_HOST_DEVICE constexpr int64_t max_of(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace fips
