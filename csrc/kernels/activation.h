// Element-wise part of the MLP: h = act(up), or h = act(gate) * up for a gated MLP, and its
// gradient.
#pragma once

#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/parallel.h"
#include "core/types.h"

namespace fips {

enum class Activation : int32_t { kIdentity, kGelu, kGeluTanh, kSilu, kRelu, kRelu2, kQuickGelu };

inline Activation parse_activation(const std::string& name) {
  static constexpr const char* kNames[] = {"identity", "gelu",  "gelu_tanh", "silu",
                                           "relu",     "relu2", "quick_gelu"};
  for (int32_t i = 0; i < 7; ++i) {
    if (name == kNames[i]) {
      return static_cast<Activation>(i);
    }
  }
  fail("activation: got '", name,
       "'; allowed are identity, gelu, gelu_tanh, silu, relu, relu2 and quick_gelu");
}

struct ActivationParams {
  Activation activation = Activation::kIdentity;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
  void* up = nullptr;  // pre-activation; backward: overwritten by its gradient
  void* gate =
      nullptr;  // pre-activation of the gate, or null; backward: overwritten by its gradient
  const void* grad_h = nullptr;  // backward only
  void* h = nullptr;             // the result; may be `up` in forward
};

namespace cpu {

void activation_forward(const ActivationParams& params, const Parallel& parallel);

// Also recomputes `h` when it is not null, since the gradient of the next factor needs it.
void activation_backward(const ActivationParams& params, const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
