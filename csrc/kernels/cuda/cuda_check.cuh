// A failed CUDA call throws fips::Error with the call, the name of the error and what it means.
#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

#define FIPS_CUDA_CHECK(call)                                                         \
  do {                                                                                \
    const cudaError_t status_ = (call);                                               \
    if (status_ != cudaSuccess) {                                                     \
      ::fips::fail("CUDA: ", #call, " failed with ", cudaGetErrorName(status_), " (", \
                   cudaGetErrorString(status_), ")");                                 \
    }                                                                                 \
  } while (0)
