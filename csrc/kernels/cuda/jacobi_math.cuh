// The rotation of two rows, and what float and double name differently.
#pragma once

#include <cmath>

#include "kernels/cuda/common.cuh"

namespace fips::cuda {

FIPS_DEVICE float square_root(float x) { return sqrtf(x); }
FIPS_DEVICE double square_root(double x) { return sqrt(x); }
FIPS_DEVICE float magnitude(float x) { return fabsf(x); }
FIPS_DEVICE double magnitude(double x) { return fabs(x); }

// The power of two next to `largest`, so that dividing by it is exact; 1 for 0. Both the power and
// its inverse are normal numbers of type T.
template <class T>
FIPS_DEVICE double power_of_two_near(double largest) {
  constexpr int kRange = sizeof(T) == 8 ? 1022 : 126;
  if (!(largest > 0)) {
    return 1;
  }
  return scalbn(1.0, static_cast<int>(max_of(-kRange, min_of(ilogb(largest), kRange))));
}

// x' = c x - s y, y' = s x + c y in the form x' = x - s (y + tau x), y' = y + s (x - tau y), which
// adds a small correction where the angle is small and so rounds less (Rutishauser 1966).
template <class T>
struct Rotation {
  T sine, tau;
};

// Makes rows of squared norms xx, yy and product xy != 0 orthogonal, by the smaller of both angles.
template <class T>
FIPS_DEVICE Rotation<T> orthogonalising(T xx, T yy, T xy) {
  const T zeta = (yy - xx) / (2 * xy);
  const T size = T(1) / (magnitude(zeta) + square_root(1 + zeta * zeta));
  const T tangent = zeta < 0 ? -size : size;
  const T cosine = T(1) / square_root(1 + tangent * tangent);
  const T sine = cosine * tangent;
  return {sine, sine / (1 + cosine)};
}

// One warp rotates rows x and y, whose first `dot_chunks` chunks (of 16 bytes) must become
// orthogonal and whose `all_chunks` follow. True if it had to. Rows in shared memory, 16-byte
// aligned; a lane touches the same chunks throughout.
template <class T>
FIPS_DEVICE bool rotate_rows(Chunk<T>* x, Chunk<T>* y, int dot_chunks, int all_chunks,
                             T null_square, T tolerance) {
  T sums[3] = {};  // |x|^2, |y|^2, x y
  for (int c = lane_index(); c < dot_chunks; c += kWarpSize) {
    const Chunk<T> a = x[c], b = y[c];
    FIPS_UNROLL
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      sums[0] += a.element[i] * a.element[i];
      sums[1] += b.element[i] * b.element[i];
      sums[2] += a.element[i] * b.element[i];
    }
  }
  warp_sums(sums);
  const bool alive = sums[0] > null_square && sums[1] > null_square;
  // Two roots: the product of the squares could underflow.
  const T bound = tolerance * square_root(sums[0]) * square_root(sums[1]);
  if (!alive || !(magnitude(sums[2]) > bound)) {
    return false;
  }
  const Rotation<T> r = orthogonalising(sums[0], sums[1], sums[2]);
  for (int c = lane_index(); c < all_chunks; c += kWarpSize) {
    Chunk<T> a = x[c], b = y[c];
    FIPS_UNROLL
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      const T u = a.element[i], v = b.element[i];
      a.element[i] = u - r.sine * (v + r.tau * u);
      b.element[i] = v + r.sine * (u - r.tau * v);
    }
    x[c] = a;
    y[c] = b;
  }
  return true;
}

}  // namespace fips::cuda
