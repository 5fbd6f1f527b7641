// Element types and their conversions. Everything here is header-only and forced inline: the same
// header is compiled once per instruction set, and a shared out-of-line copy could carry AVX-512
// code into the scalar path.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FIPS_HOST_DEVICE __host__ __device__
#else
#define FIPS_HOST_DEVICE
#endif
#define FIPS_INLINE static inline __attribute__((always_inline))

namespace fips {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FIPS_INLINE int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

FIPS_INLINE const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

// The type sums are made in: double for double, float for everything else.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

FIPS_INLINE float to_accumulator(float x) { return x; }
FIPS_INLINE double to_accumulator(double x) { return x; }
FIPS_INLINE float to_accumulator(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
FIPS_INLINE float to_accumulator(Half x) {
  _Float16 y;
  memcpy(&y, &x.bits, sizeof y);
  return static_cast<float>(y);
}

template <class T>
struct FromAccumulator;
template <>
struct FromAccumulator<float> {
  FIPS_INLINE float convert(float x) { return x; }
};
template <>
struct FromAccumulator<double> {
  FIPS_INLINE double convert(double x) { return x; }
};
template <>
struct FromAccumulator<BFloat16> {
  // Round to nearest, ties to even; a NaN stays a (quiet) NaN.
  FIPS_INLINE BFloat16 convert(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? ((bits >> 16) | 0x40u) : rounded)};
  }
};
template <>
struct FromAccumulator<Half> {
  FIPS_INLINE Half convert(float x) {
    _Float16 y = static_cast<_Float16>(x);
    Half h;
    memcpy(&h.bits, &y, sizeof y);
    return h;
  }
};

}  // namespace fips
