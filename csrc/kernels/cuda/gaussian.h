// Counter-based standard normals (core/philox.h): sample i is a pure function of (seed, i), the
// same on every device up to the rounding of log, sin and cos.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Fills out [count] with standard normals. `dtype`: float32 or float64.
void gaussian(void* out, int64_t count, DType dtype, uint64_t seed, Stream stream);

// out[b, i] = in[b, i] / scale[b] + noise * normal(b * count + i), in float64; where scale[b] is 0,
// the noise alone. in [batch, count] and scale [batch] are of `dtype` (float32 or float64).
void scaled_with_noise(const void* in, const void* scale, double* out, int64_t batch, int64_t count,
                       DType dtype, double noise, uint64_t seed, Stream stream);

}  // namespace fips::cuda
