// Counter-based random numbers (Philox4x32-10; Salmon, Moraes, Dror, Shaw, SC'11) and standard
// normals from them by Box-Muller. A sample is a pure function of (seed, index): the same on any
// device and with any number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/types.h"

namespace fips {

struct Philox4 {
  uint32_t v[4];
};

FIPS_INLINE FIPS_HOST_DEVICE Philox4 philox4x32(uint64_t seed, uint64_t counter) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  Philox4 c{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * c.v[0];
    const uint64_t p1 = static_cast<uint64_t>(kMul1) * c.v[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

struct NormalPair {
  double first, second;
};

// Standard normals 2 * pair and 2 * pair + 1 of stream `seed`.
FIPS_INLINE FIPS_HOST_DEVICE NormalPair philox_normals(uint64_t seed, uint64_t pair) {
  const Philox4 c = philox4x32(seed, pair);
  constexpr double kScale = 1.0 / 4294967296.0, kTwoPi = 6.283185307179586;
  const double radius = sqrt(-2.0 * log((c.v[0] + 0.5) * kScale));
  const double angle = kTwoPi * ((c.v[1] + 0.5) * kScale);
  return {radius * cos(angle), radius * sin(angle)};
}

}  // namespace fips
