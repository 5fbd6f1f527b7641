// CUDA implementation of kernels/activation.h, for float32, bfloat16 and float16.
#pragma once

#include "kernels/activation.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

void activation_forward(const ActivationParams& params, Stream stream);

// Also recomputes `h` when it is not null.
void activation_backward(const ActivationParams& params, Stream stream);

}  // namespace fips::cuda
