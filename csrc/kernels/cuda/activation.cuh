// Activation functions and their derivatives, as kernels/activation.h lists them.
#pragma once

#include <type_traits>

#include "kernels/activation.h"
#include "kernels/cuda/common.cuh"

namespace fips::cuda {

// The functions that hardware approximates. kFast is good to about 1e-6, more than a 16-bit result
// can hold, and takes a fraction of the instructions: an activation per hidden feature and token
// would otherwise cost as much as the product that feeds it.
template <bool kFast>
FIPS_DEVICE float exponential(float x) {
  if constexpr (kFast) {
    return fast_exp(x);
  } else {
    return expf(x);
  }
}

// 1 / (1 + exp(-x)); exactly 0 where exp overflows.
template <bool kFast>
FIPS_DEVICE float sigmoid(float x) {
  const float denominator = 1.0f + exponential<kFast>(-x);
  if constexpr (kFast) {
    return fast_reciprocal(denominator);
  } else {
    return 1.0f / denominator;
  }
}

struct ActivationValue {
  float value, slope;
};

// act(x) and act'(x); the compiler drops the half that the caller does not use. NaN stays NaN.
template <bool kFast>
FIPS_DEVICE ActivationValue activate_with_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu: {
      const float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
      return {x * cdf, cdf + x * 0.39894228f * exponential<kFast>(-0.5f * x * x)};
    }
    case Activation::kGeluTanh: {
      // 0.5 (1 + tanh u) = sigmoid(2 u)
      const float s = sigmoid<kFast>(1.5957691f * (x + 0.044715f * x * x * x));
      const float slope = 1.5957691f * (1.0f + 0.134145f * x * x);
      return {x * s, s + x * s * (1.0f - s) * slope};
    }
    case Activation::kSilu: {
      const float s = sigmoid<kFast>(x);
      return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    case Activation::kRelu:
      return {x <= 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f};
    case Activation::kRelu2: {
      const float positive = x <= 0 ? 0.0f : x;
      return {positive * positive, 2.0f * positive};
    }
    case Activation::kQuickGelu: {
      const float s = sigmoid<kFast>(1.702f * x);
      return {x * s, s * (1.0f + 1.702f * x * (1.0f - s))};
    }
    default:
      return {x, 1.0f};
  }
}

// Calls body(the activation as a constant), for unrolled loops that should decide once.
template <class Body>
FIPS_DEVICE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu2:
      return body(std::integral_constant<Activation, Activation::kRelu2>{});
    case Activation::kQuickGelu:
      return body(std::integral_constant<Activation, Activation::kQuickGelu>{});
    default:
      return body(std::integral_constant<Activation, Activation::kIdentity>{});
  }
}

// T: the element type that the result is rounded to.
template <class T>
FIPS_DEVICE float activate(Activation activation, float x) {
  return activate_with_slope < sizeof(T) == 2 > (activation, x).value;
}

}  // namespace fips::cuda
