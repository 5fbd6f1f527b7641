// Made by benchmarks/tuning_table.py from what benchmarks/tune.py measured; do not edit. Each way
// was timed on both sides of a threshold, which lies where they take the same time.
#pragma once

#include "kernels/cuda/tuning.h"

namespace fips::cuda {

inline constexpr Tuning kTuning[] = {
    // Every other GPU: estimates, not yet measured.
    {0, 64, 64, 0.65, 0.3, 1.0},
};

}  // namespace fips::cuda
