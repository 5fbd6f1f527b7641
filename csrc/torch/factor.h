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
      : device_(device), slice_(std::move(slice)), name_(name) {
    check_sizes(slice_.view, name);
  }

  // As given: sizes, index, and values or codes.
  const BlockSparseView& stored() const { return slice_.view; }
  // What every kernel of the device can read.
  const BlockSparseView& view() const;
  const Tensor& values() const { return slice_.values(); }

  // Whether one kernel can multiply by both at once.
  bool is_like(const Factor& other) const {
    return stored().bk == other.stored().bk && stored().bn == other.stored().bn &&
           stored().is_bitmap() == other.stored().is_bitmap();
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
  mutable bool verified_ = false;
  mutable std::optional<Slice> plain_;   // values in place of codes, made at the first need
  mutable std::optional<Tensor> dense_;  // V^T filled with zeros, ditto
};

}  // namespace fips
