// Activations and their gradients for one instruction set: vectors of floats without library calls
// or branches, doubles one by one.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/vector.h"

namespace fips::cpu::FIPS_ISA {
namespace {

constexpr int64_t kChunk = 256;

// What is evaluated at once: a vector of floats, or one double (whose functions are the library's).
template <class A>
struct LaneOf {
  using type = Vector<float>;
};
template <>
struct LaneOf<double> {
  using type = double;
};
template <class A>
using Lane = typename LaneOf<A>::type;

template <class A>
constexpr int64_t kLaneWidth = static_cast<int64_t>(sizeof(Lane<A>) / sizeof(A));

template <class A>
FIPS_INLINE Lane<A> load_lane(const A* p) {
  Lane<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}

typedef uint32_t Bits __attribute__((vector_size(FIPS_VECTOR_BYTES)));

// exp(x) to 3 ulp: x = n ln 2 + f with |f| <= ln 2 / 2, a degree-6 Taylor-like polynomial in f,
// times 2^n.
FIPS_INLINE Vector<float> exp_of(Vector<float> x) {
  x = x < -87.0f ? Vector<float>{} - 87.0f : x;
  x = x > 88.0f ? Vector<float>{} + 88.0f : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504f + kRounder;
  const Vector<float> n = shifted - kRounder;
  const Vector<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector<float> y = f * 1.3888889e-3f + 8.3333338e-3f;
  y = y * f + 4.1666668e-2f;
  y = y * f + 1.6666667e-1f;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  // The rounded integer sits in the low bits of `shifted`.
  Bits bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  Vector<float> power;
  memcpy(&power, &bits, sizeof power);
  return y * power;
}
FIPS_INLINE double exp_of(double x) { return std::exp(x); }

// 1 / x to 2 ulp for x of at least 1: a division takes as long as the rest of an activation.
FIPS_INLINE Vector<float> reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps(x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
FIPS_INLINE double reciprocal(double x) { return 1.0 / x; }

// erf as x P(x^2) / Q(x^2), fitted for |x| <= 3.9 to 1.5e-8 absolute, 4e-7 with float rounding;
// from there on a float's erf is 1.
FIPS_INLINE Vector<float> erf_of(Vector<float> x) {
  constexpr float kOne = 3.9f;
  const Vector<float> zero = {}, one = zero + 1.0f, limit = zero + kOne;
  const Vector<float> z = x < -kOne ? -limit : x > kOne ? limit : x;
  const Vector<float> s = z * z;
  Vector<float> p = s * 2.0503874e-6f + 2.8745676e-4f;
  p = p * s + 3.8368616e-3f;
  p = p * s + 5.2966874e-2f;
  p = p * s + 1.9194070e-1f;
  p = p * s + 1.1283790f;
  Vector<float> q = s * 3.8230715e-5f + 1.1817305e-3f;
  q = q * s + 1.5109176e-2f;
  q = q * s + 1.1475807e-1f;
  q = q * s + 5.0343478e-1f;
  q = q * s + 1.0f;
  const Vector<float> y = z * p * reciprocal(q);
  // Exactly 1: what is left of it would grow with x in x (1 + erf x).
  return x < -kOne ? -one : x > kOne ? one : y;
}
FIPS_INLINE double erf_of(double x) { return std::erf(x); }

template <class A, class V>
FIPS_INLINE V sigmoid(V x) {
  // Exactly 0 where exp_of stops growing: the rest of it would grow again with a factor of x.
  return x < A(-88) ? V{} : reciprocal(A(1) + exp_of(-x));
}

// Calls body(the activation as a constant).
template <class F>
FIPS_INLINE void with_activation(Activation activation, F&& body) {
  switch (activation) {
    case Activation::kIdentity:
      return body(std::integral_constant<Activation, Activation::kIdentity>{});
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
  }
}

template <class V>
struct Evaluated {
  V value, slope;
};

// act(x) and act'(x); the compiler drops the half that the caller does not use.
template <Activation kind, class A, class V = Lane<A>>
FIPS_INLINE Evaluated<V> evaluate(V x) {
  const V zero = {};
  if constexpr (kind == Activation::kIdentity) {
    return {x, zero + A(1)};
  } else if constexpr (kind == Activation::kGelu) {
    const V cdf = A(0.5) * (A(1) + erf_of(x * A(0.70710678118654752)));
    return {x * cdf, cdf + x * exp_of(A(-0.5) * x * x) * A(0.39894228040143268)};
  } else if constexpr (kind == Activation::kGeluTanh) {
    // 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr A c = A(0.79788456080286536);
    const V s = sigmoid<A>(A(2) * c * (x + A(0.044715) * x * x * x));
    return {x * s, s + x * s * (A(1) - s) * A(2) * c * (A(1) + A(0.134145) * x * x)};
  } else if constexpr (kind == Activation::kSilu) {
    const V s = sigmoid<A>(x);
    return {x * s, s * (A(1) + x * (A(1) - s))};
  } else if constexpr (kind == Activation::kRelu) {
    return {x < zero ? zero : x, x > zero ? zero + A(1) : zero};  // a NaN stays one
  } else if constexpr (kind == Activation::kRelu2) {
    const V r = x < zero ? zero : x;  // a NaN stays one
    return {r * r, A(2) * r};
  } else {
    const V s = sigmoid<A>(A(1.702) * x);
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
  alignas(64) A up[kChunk] = {}, gate[kChunk] = {};  // whole lanes are evaluated
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = min_of(kChunk, end - i);
    read<T>(p.up, i, count, up);
    if (p.gate == nullptr) {
      for (int64_t e = 0; e < count; e += kLaneWidth<A>) {
        const Lane<A> h = evaluate<kind, A>(load_lane(up + e)).value;
        memcpy(up + e, &h, sizeof h);
      }
    } else {
      read<T>(p.gate, i, count, gate);
      for (int64_t e = 0; e < count; e += kLaneWidth<A>) {
        const Lane<A> h = evaluate<kind, A>(load_lane(gate + e)).value * load_lane(up + e);
        memcpy(up + e, &h, sizeof h);
      }
    }
    write<T>(up, p.h, i, count);
  }
}

template <class T, Activation kind>
void backward_range(const ActivationParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  alignas(64) A up[kChunk] = {}, gate[kChunk] = {}, grad[kChunk] = {}, h[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = min_of(kChunk, end - i);
    read<T>(p.up, i, count, up);
    read<T>(p.grad_h, i, count, grad);
    if (p.gate == nullptr) {
      for (int64_t e = 0; e < count; e += kLaneWidth<A>) {
        const Evaluated<Lane<A>> at = evaluate<kind, A>(load_lane(up + e));
        const Lane<A> grad_up = load_lane(grad + e) * at.slope;
        memcpy(h + e, &at.value, sizeof at.value);
        memcpy(up + e, &grad_up, sizeof grad_up);
      }
    } else {
      read<T>(p.gate, i, count, gate);
      for (int64_t e = 0; e < count; e += kLaneWidth<A>) {
        const Evaluated<Lane<A>> at = evaluate<kind, A>(load_lane(gate + e));
        const Lane<A> value = load_lane(up + e), grad_h = load_lane(grad + e);
        const Lane<A> product = at.value * value, grad_gate = grad_h * value * at.slope;
        const Lane<A> grad_up = grad_h * at.value;
        memcpy(h + e, &product, sizeof product);
        memcpy(gate + e, &grad_gate, sizeof grad_gate);
        memcpy(up + e, &grad_up, sizeof grad_up);
      }
      write<T>(gate, p.gate, i, count);
    }
    write<T>(up, p.up, i, count);
    if (p.h != nullptr) {
      write<T>(h, p.h, i, count);
    }
  }
}

template <bool kBackward>
void activation_range(const ActivationParams& p, int64_t begin, int64_t end) {
  with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    with_activation(p.activation, [&](auto kind) {
      kBackward ? backward_range<T, kind()>(p, begin, end)
                : forward_range<T, kind()>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
