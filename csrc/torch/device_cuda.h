// Device on an NVIDIA GPU: everything runs on the current stream of the tensors' device, nothing
// waits for it.
#pragma once

#include "torch/cuda_scope.h"
#include "torch/device.h"

namespace fips {

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const Tensor& tensor) : scope_(tensor), like_(tensor) {}

  void check_index(const BlockSparseView& v, const char* name) const override;
  bool reads_codes() const override { return false; }
  Slice dequantised(const Slice& slice) const override;
  MmPath mm_path(const MmShape& shape) const override;
  MmPath sddmm_path(const MmShape& shape) const override;
  int64_t chunk_tokens(int64_t hidden, bool gradients) const override;
  bool has_shared_mlp(const SharedMlpParams& params) const override;
  bool shared_mlp(const SharedMlpParams& params) const override;
  bool block_sparse_mm(const BlockSparseMmParams& params,
                       const MmEpilogue& epilogue) const override;
  void block_sparse_sddmm(const BlockSparseSddmmParams& params) const override;
  void fill_dense_transposed(const BlockSparseView& v, const Tensor& out) const override;
  void gather_stored(const GatherParams& params) const override;
  void activation_forward(const ActivationParams& params) const override;
  void activation_backward(const ActivationParams& params) const override;
  Tensor token_sum(const Tensor& a, const Tensor& b) const override;
  void add_into(const Tensor& sums, const Tensor& values) const override;
  void add_column_sums(const Tensor& sums, const Tensor& matrix) const override;
  void scale_into(const Tensor& out, const Tensor& sums, double scale) const override;
  void add_residual(const Tensor& y, const Tensor& target, const float* weight,
                    const Tensor& loss) const override;
  void scale_loss(const Tensor& result, const Tensor& loss, double scale) const override;

 private:
  // Scratch memory from torch's allocator, which reuses it in the order of the stream.
  Tensor workspace(int64_t bytes) const;

  CudaScope scope_;
  Tensor like_;
};

}  // namespace fips
