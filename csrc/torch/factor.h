// A slice and its three products, each by the path that the device's planner chooses.
#pragma once

#include <optional>
#include <utility>

#include "torch/device.h"

namespace fips {

class Factor {
 public:
  // `name` is the argument's name in messages; `device` outlives the factor.
  Factor(const Device& device, Slice slice, const char* name)
      : device_(device),
        slice_(std::move(slice)),
        name_(name),
        quantised_(slice_.view.is_quantised()) {
    check_sizes(slice_.view, name);
    if (quantised_) {
      device_.prepare_quantised(slice_);
    }
  }

  const BlockSparseView& view() const { return slice_.view; }
  const Tensor& values() const { return slice_.values(); }

  // Whether one kernel can multiply by both at once.
  bool is_like(const Factor& other) const {
    return view().bk == other.view().bk && view().bn == other.view().bn &&
           view().is_bitmap() == other.view().is_bitmap();
  }

  // Validates every index, once. Products of a few tokens do without: they would spend a good part
  // of their time on it, and their kernels are safe with any index.
  void verify() const;

  // Throws if the values are codes: those have no gradient.
  void check_trainable() const;

  // x V + bias or x V^T + bias, for x [tokens, features] with contiguous features.
  Tensor mm(const Tensor& x, bool transpose,
            const std::optional<Tensor>& bias = std::nullopt) const;

  // act(x V + bias), or with a gate act(x gate + gate_bias) * (x V + bias), in one pass over x
  // where the planner keeps to the stored blocks.
  Tensor mm_activated(const Tensor& x, const std::optional<Tensor>& bias, const Factor* gate,
                      const std::optional<Tensor>& gate_bias, Activation activation) const;

  // sums += a^T b on the stored slots, for contiguous a and b; sums has the shape of the values, in
  // the accumulator type.
  void add_sddmm(const Tensor& a, const Tensor& b, const Tensor& sums) const;

 private:
  const Tensor& dense_transposed() const;
  bool is_sparse(int64_t tokens) const;
  Tensor run(const Tensor& x, bool transpose, const std::optional<Tensor>& bias, const Factor* gate,
             const std::optional<Tensor>& gate_bias, Activation activation) const;

  const Device& device_;
  Slice slice_;
  const char* name_;
  bool quantised_;  // as given
  mutable bool verified_ = false;
  mutable std::optional<Tensor> dense_;  // V^T filled with zeros, made at the first need
};

}  // namespace fips
