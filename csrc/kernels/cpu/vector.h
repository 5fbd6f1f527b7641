// Vectors as wide as the instruction set this file is compiled for, by the compiler's vector
// extension. Included only from per-ISA translation units, inside none of their namespaces:
// everything is inline.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FIPS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FIPS_VECTOR_BYTES 32
#else
#define FIPS_VECTOR_BYTES 16
#endif

namespace fips::cpu {
namespace {  // one copy per translation unit: see core/types.h

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FIPS_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FIPS_VECTOR_BYTES)));
};
template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int64_t kLanes = FIPS_VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

template <class A>
FIPS_INLINE Vector<A> load(const A* p) {
  Vector<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
FIPS_INLINE void store(A* p, Vector<A> v) {
  memcpy(p, &v, sizeof v);
}

template <class A>
FIPS_INLINE A sum_lanes(Vector<A> v) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) {
    return _mm512_reduce_add_ps(v);
  }
#endif
  A sum = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    sum += v[i];
  }
  return sum;
}

}  // namespace
}  // namespace fips::cpu
