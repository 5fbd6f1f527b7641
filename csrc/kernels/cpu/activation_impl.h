// Activations and their gradients for one instruction set, written so that the compiler vectorises
// them: no library calls in float, no branches.
#pragma once

#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/vector.h"

namespace fips::cpu::FIPS_ISA {
namespace {

constexpr int64_t kChunk = 256;

// exp(x) to 3 ulp: x = n ln 2 + f with |f| <= ln 2 / 2, a degree-6 Taylor-like polynomial in f,
// times 2^n.
FIPS_INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float y = 1.3888889e-3f;
  y = y * f + 8.3333338e-3f;
  y = y * f + 4.1666668e-2f;
  y = y * f + 1.6666667e-1f;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  // The rounded integer sits in the low bits of `shifted`; unsigned, so that a NaN is no overflow.
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return y * power;
}
FIPS_INLINE double exp_of(double x) { return std::exp(x); }

// erf by Abramowitz and Stegun 7.1.26: absolute error 1.5e-7, and 6e-7 with float rounding.
FIPS_INLINE float erf_of(float x) {
  const float z = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float y = 1.061405429f;
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  y = 1.0f - y * t * exp_of(-z * z);
  return x < 0 ? -y : y;
}
FIPS_INLINE double erf_of(double x) { return std::erf(x); }

template <class A>
FIPS_INLINE A sigmoid(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

template <class A>
struct Evaluated {
  A value, slope;
};

// act(x) and act'(x); the compiler drops the half that the caller does not use.
template <Activation kind, class A>
FIPS_INLINE Evaluated<A> evaluate(A x) {
  if constexpr (kind == Activation::kIdentity) {
    return {x, A(1)};
  } else if constexpr (kind == Activation::kGelu) {
    const A cdf = A(0.5) * (A(1) + erf_of(x * A(0.70710678118654752)));
    return {x * cdf, cdf + x * exp_of(A(-0.5) * x * x) * A(0.39894228040143268)};
  } else if constexpr (kind == Activation::kGeluTanh) {
    // 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr A c = A(0.79788456080286536);
    const A s = sigmoid<A>(A(2) * c * (x + A(0.044715) * x * x * x));
    return {x * s, s + x * s * (A(1) - s) * A(2) * c * (A(1) + A(0.134145) * x * x)};
  } else if constexpr (kind == Activation::kSilu) {
    const A s = sigmoid<A>(x);
    return {x * s, s * (A(1) + x * (A(1) - s))};
  } else if constexpr (kind == Activation::kRelu) {
    return {x < 0 ? A(0) : x, x > 0 ? A(1) : A(0)};  // a NaN stays one
  } else if constexpr (kind == Activation::kRelu2) {
    const A r = x < 0 ? A(0) : x;  // a NaN stays one
    return {r * r, A(2) * r};
  } else {
    const A s = sigmoid<A>(A(1.702) * x);
    return {x * s, s + x * A(1.702) * s * (A(1) - s)};
  }
}

template <class T>
FIPS_INLINE void read(const void* from, int64_t begin, int64_t count, Accumulator<T>* out) {
  const T* in = static_cast<const T*>(from) + begin;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = to_accumulator(in[i]);
  }
}

template <class T>
FIPS_INLINE void write(const Accumulator<T>* in, void* to, int64_t begin, int64_t count) {
  T* out = static_cast<T*>(to) + begin;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = FromAccumulator<T>::convert(in[i]);
  }
}

template <class T, Activation kind>
void forward_range(const ActivationParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  alignas(64) A up[kChunk], gate[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = min_of(kChunk, end - i);
    read<T>(p.up, i, count, up);
    if (p.gate == nullptr) {
      for (int64_t e = 0; e < count; ++e) {
        up[e] = evaluate<kind>(up[e]).value;
      }
    } else {
      read<T>(p.gate, i, count, gate);
      for (int64_t e = 0; e < count; ++e) {
        up[e] *= evaluate<kind>(gate[e]).value;
      }
    }
    write<T>(up, p.h, i, count);
  }
}

template <class T, Activation kind>
void backward_range(const ActivationParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  alignas(64) A up[kChunk], gate[kChunk], grad[kChunk], h[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = min_of(kChunk, end - i);
    read<T>(p.up, i, count, up);
    read<T>(p.grad_h, i, count, grad);
    if (p.gate == nullptr) {
      for (int64_t e = 0; e < count; ++e) {
        const Evaluated<A> at = evaluate<kind>(up[e]);
        h[e] = at.value;
        up[e] = grad[e] * at.slope;
      }
    } else {
      read<T>(p.gate, i, count, gate);
      for (int64_t e = 0; e < count; ++e) {
        const Evaluated<A> at = evaluate<kind>(gate[e]);
        h[e] = at.value * up[e];
        gate[e] = grad[e] * up[e] * at.slope;
        up[e] = grad[e] * at.value;
      }
      write<T>(gate, p.gate, i, count);
    }
    write<T>(up, p.up, i, count);
    if (p.h != nullptr) {
      write<T>(h, p.h, i, count);
    }
  }
}

template <class T, bool kBackward>
void any_range(const ActivationParams& p, int64_t begin, int64_t end) {
  auto run = [&](auto kind) {
    constexpr Activation kKind = decltype(kind)::value;
    kBackward ? backward_range<T, kKind>(p, begin, end) : forward_range<T, kKind>(p, begin, end);
  };
  switch (p.activation) {
    case Activation::kIdentity:
      return run(std::integral_constant<Activation, Activation::kIdentity>{});
    case Activation::kGelu:
      return run(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return run(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu2:
      return run(std::integral_constant<Activation, Activation::kRelu2>{});
    case Activation::kQuickGelu:
      return run(std::integral_constant<Activation, Activation::kQuickGelu>{});
  }
}

template <bool kBackward>
void activation_range(const ActivationParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return any_range<float, kBackward>(p, begin, end);
    case DType::kFloat64:
      return any_range<double, kBackward>(p, begin, end);
    case DType::kBFloat16:
      return any_range<BFloat16, kBackward>(p, begin, end);
    case DType::kFloat16:
      return any_range<Half, kBackward>(p, begin, end);
  }
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
