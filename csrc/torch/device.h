// What the ops on slices ask of the device their tensors are on. Everything else they do is
// torch's, which knows devices itself.
#pragma once

#include "core/planner.h"
#include "kernels/activation.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/dense_fill.h"
#include "kernels/shared_mlp.h"
#include "torch/tensor_utils.h"

namespace fips {

class Device {
 public:
  virtual ~Device() = default;

  // Throws if an index of the slice leads outside. Where an index cannot be read without waiting,
  // does nothing: the kernels there skip such entries.
  virtual void check_index(const BlockSparseView& v, const char* name) const = 0;

  // Whether every kernel of the device reads codes. If not, the one for few tokens does, and the
  // others get values.
  virtual bool reads_codes() const = 0;
  // The same slice with values in place of codes.
  virtual Slice dequantised(const Slice& slice) const = 0;

  virtual MmPath mm_path(const MmShape& shape) const = 0;
  virtual MmPath sddmm_path(const MmShape& shape) const = 0;

  // Tokens whose [tokens, hidden] activations are held at once: one of them, or with `gradients`
  // four or five.
  virtual int64_t chunk_tokens(int64_t hidden, bool gradients) const = 0;

  // Whether a kernel for the whole MLP is the best way for these arguments (y is not looked at).
  virtual bool has_shared_mlp(const SharedMlpParams& params) const = 0;
  // That kernel. False if entries out of range were skipped and the caller can find them by
  // check_index.
  virtual bool shared_mlp(const SharedMlpParams& params) const = 0;

  // False if entries out of range were skipped and the caller can find them by check_index.
  virtual bool block_sparse_mm(const BlockSparseMmParams& params,
                               const MmEpilogue& epilogue) const = 0;
  virtual void block_sparse_sddmm(const BlockSparseSddmmParams& params) const = 0;
  virtual void fill_dense_transposed(const BlockSparseView& v, const Tensor& out) const = 0;
  virtual void gather_stored(const GatherParams& params) const = 0;
  virtual void activation_forward(const ActivationParams& params) const = 0;
  virtual void activation_backward(const ActivationParams& params) const = 0;

  // a^T b over the tokens, for a gradient sum.
  virtual Tensor token_sum(const Tensor& a, const Tensor& b) const = 0;
  // sums += values
  virtual void add_into(const Tensor& sums, const Tensor& values) const = 0;
  // sums [c] += the sum over the rows of matrix [t, c]
  virtual void add_column_sums(const Tensor& sums, const Tensor& matrix) const = 0;
  // out = scale * sums, rounded
  virtual void scale_into(const Tensor& out, const Tensor& sums, double scale) const = 0;
  // y [t, c] = weight [t] * (y - target); loss (float64) += sum of weight * (y - target)^2. No
  // weight is all ones.
  virtual void add_residual(const Tensor& y, const Tensor& target, const float* weight,
                            const Tensor& loss) const = 0;
  // result = scale * loss, both scalars
  virtual void scale_loss(const Tensor& result, const Tensor& loss, double scale) const = 0;
};

}  // namespace fips
