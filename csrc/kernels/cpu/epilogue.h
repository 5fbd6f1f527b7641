// From the sums of a few tokens to stored outputs: bias, activation, gate, rounding. Included
// only from per-ISA units.
#pragma once

#include "kernels/block_sparse_mm.h"
#include "kernels/cpu/activation_impl.h"
#include "kernels/cpu/block_tile.h"

namespace fips::cpu::FIPS_ISA {
namespace {

// Rounds one lane of sums to its outputs, of which `count` exist. `bypass` keeps whole, aligned
// lanes out of the caches.
template <class T, class A = Accumulator<T>>
FIPS_INLINE void write_lane(Lane<A> sums, int64_t count, [[maybe_unused]] bool bypass, T* out) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, BFloat16)) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums));
    if (bypass && count >= 16) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out), rounded);
    } else {
      _mm256_mask_storeu_epi16(out, count >= 16 ? __mmask16(0xffff) : first_lanes(count), rounded);
    }
    return;
  }
#endif
  if constexpr (sizeof(Lane<A>) == sizeof(T) * kLaneWidth<A>) {
    if (count >= kLaneWidth<A>) {
#if defined(__AVX512F__)
      if constexpr (__is_same(T, float)) {
        if (bypass) {
          return _mm512_stream_ps(out, sums);
        }
      }
#endif
      memcpy(out, &sums, sizeof sums);
      return;
    }
  }
  A values[kLaneWidth<A>];
  memcpy(values, &sums, sizeof sums);
  if (count >= kLaneWidth<A>) {
    for (int64_t i = 0; i < kLaneWidth<A>; ++i) {
      out[i] = FromAccumulator<T>::convert(values[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = FromAccumulator<T>::convert(values[i]);
    }
  }
}

// The epilogue of one block column: its biases, read once.
template <class T>
class Epilogue {
  using A = Accumulator<T>;

 public:
  Epilogue(const BlockSparseMmParams& p, const MmEpilogue& epilogue, bool bypass,
           int64_t first_output, int64_t outputs)
      : p_(p),
        epilogue_(epilogue),
        first_output_(first_output),
        outputs_(outputs),
        bypass_(bypass) {
    read_bias(p.bias, bias_);
    read_bias(epilogue.gate_bias, gate_bias_);
  }

  // `up` and `gate` (null without one) are [rows][stride] sums.
  void write(const A* up, const A* gate, int64_t stride, int64_t first_token, int64_t rows) const {
    with_activation(epilogue_.activation,
                    [&](auto kind) { write_as<kind()>(up, gate, stride, first_token, rows); });
  }

 private:
  void read_bias(const void* bias, A* out) const {
    const T* values = static_cast<const T*>(bias);
    for (int64_t o = 0; o < kMaxEdge; ++o) {
      out[o] =
          values == nullptr || o >= outputs_ ? A(0) : to_accumulator(values[first_output_ + o]);
    }
  }

  template <Activation kind>
  void write_as(const A* up, const A* gate, int64_t stride, int64_t first_token,
                int64_t rows) const {
    T* out = static_cast<T*>(p_.out) + first_token * p_.out_stride + first_output_;
    for (int64_t r = 0; r < rows; ++r, up += stride, out += p_.out_stride) {
      if (gate == nullptr) {
        for (int64_t o = 0; o < outputs_; o += kLaneWidth<A>) {
          write_lane<T>(evaluate<kind, A>(load_lane(up + o) + load_lane(bias_ + o)).value,
                        outputs_ - o, bypass_, out + o);
        }
      } else {
        for (int64_t o = 0; o < outputs_; o += kLaneWidth<A>) {
          write_lane<T>(evaluate<kind, A>(load_lane(gate + o) + load_lane(gate_bias_ + o)).value *
                            (load_lane(up + o) + load_lane(bias_ + o)),
                        outputs_ - o, bypass_, out + o);
        }
        gate += stride;
      }
    }
  }

  const BlockSparseMmParams& p_;
  const MmEpilogue& epilogue_;
  int64_t first_output_, outputs_;
  bool bypass_;
  alignas(64) A bias_[kMaxEdge], gate_bias_[kMaxEdge];
};

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
