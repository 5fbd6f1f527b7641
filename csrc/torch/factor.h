// A slice on the CPU and its three products, each by the path that the planner chooses.
#pragma once

#include <optional>
#include <utility>

#include "core/planner.h"
#include "torch/tensor_utils.h"

namespace fips {

class Factor {
 public:
  explicit Factor(Slice slice) : slice_(std::move(slice)) {}

  const BlockSparseView& view() const { return slice_.view; }
  const Tensor& values() const { return slice_.values(); }

  // x V + bias or x V^T + bias, for x [tokens, features] contiguous.
  Tensor mm(const Tensor& x, bool transpose,
            const std::optional<Tensor>& bias = std::nullopt) const;

  // sums += a^T b on the stored slots; sums has the shape of the values, in the accumulator type.
  void add_sddmm(const Tensor& a, const Tensor& b, const Tensor& sums) const;

 private:
  const Tensor& dense_transposed() const;

  Slice slice_;
  mutable std::optional<Tensor> dense_;  // V^T filled with zeros, made at the first need
};

}  // namespace fips
