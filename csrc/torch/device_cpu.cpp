#include "torch/device_cpu.h"

#include "kernels/reduce.h"
#include "torch/scratch.h"

namespace fips {

void CpuDevice::check_index(const BlockSparseView& v, const char* name) const {
  check_view(v, name);
}

MmPath CpuDevice::mm_path(const MmShape& shape) const { return choose_mm_path(shape); }

MmPath CpuDevice::sddmm_path(const MmShape& shape) const { return choose_sddmm_path(shape); }

int64_t CpuDevice::chunk_tokens(int64_t hidden) const {
  constexpr int64_t kChunkElements = int64_t{4} << 20;
  return max_of(128, min_of(2048, kChunkElements / max_of(1, hidden)));
}

WholeMlp CpuDevice::shared_mlp(const SharedMlpParams& params) const {
  if (!cpu::decodes_shared_mlp(params)) {
    return WholeMlp::kNone;
  }
  char* workspace = thread_scratch(cpu::shared_mlp_decode_workspace(params, kTorchThreads));
  return cpu::shared_mlp_decode(params, workspace, kTorchThreads) ? WholeMlp::kDone
                                                                  : WholeMlp::kSkippedEntries;
}

bool CpuDevice::block_sparse_mm(const BlockSparseMmParams& params,
                                const MmEpilogue& epilogue) const {
  // Fresh memory of this size would be mapped and zeroed page by page at every call.
  char* workspace = thread_scratch(cpu::block_sparse_mm_workspace(params, epilogue, kTorchThreads));
  return cpu::block_sparse_mm(params, epilogue, workspace, kTorchThreads);
}

void CpuDevice::block_sparse_sddmm(const BlockSparseSddmmParams& params) const {
  cpu::block_sparse_sddmm(params, kTorchThreads);
}

void CpuDevice::fill_dense_transposed(const BlockSparseView& v, const Tensor& out) const {
  cpu::fill_dense_transposed(v, out.mutable_data_ptr(), kTorchThreads);
}

void CpuDevice::gather_stored(const GatherParams& params) const {
  cpu::gather_stored(params, kTorchThreads);
}

void CpuDevice::activation_forward(const ActivationParams& params) const {
  cpu::activation_forward(params, kTorchThreads);
}

void CpuDevice::activation_backward(const ActivationParams& params) const {
  cpu::activation_backward(params, kTorchThreads);
}

// float16 is multiplied in float32: a sum over thousands of tokens can leave its range. bfloat16
// cannot overflow, and its product is rounded once per chunk of tokens.
Tensor CpuDevice::token_sum(const Tensor& a, const Tensor& b) const {
  const ScalarType type = a.scalar_type() == ScalarType::Half ? ScalarType::Float : a.scalar_type();
  return expect_contiguous(
      torch::stable::matmul(transposed(torch::stable::to(a, type)), torch::stable::to(b, type)),
      type);
}

void CpuDevice::add_into(const Tensor& sums, const Tensor& values) const {
  cpu::add_into(sums.mutable_data_ptr(), values.const_data_ptr(), dtype_of(values, "values"),
                values.numel(), kTorchThreads);
}

void CpuDevice::add_column_sums(const Tensor& sums, const Tensor& matrix) const {
  cpu::add_column_sums(sums.mutable_data_ptr(), matrix.const_data_ptr(), dtype_of(matrix, "matrix"),
                       matrix.size(0), matrix.size(1), kTorchThreads);
}

void CpuDevice::scale_into(const Tensor& out, const Tensor& sums, double scale) const {
  cpu::scale_into(out.mutable_data_ptr(), sums.const_data_ptr(), scale, dtype_of(out, "out"),
                  sums.numel(), kTorchThreads);
}

void CpuDevice::add_residual(const Tensor& y, const Tensor& target, const float* weight,
                             const Tensor& loss) const {
  *static_cast<double*>(loss.mutable_data_ptr()) +=
      cpu::weighted_residual(y.mutable_data_ptr(), target.const_data_ptr(), weight,
                             dtype_of(y, "y"), y.size(0), y.size(1), kTorchThreads);
}

void CpuDevice::scale_loss(const Tensor& result, const Tensor& loss, double scale) const {
  const double value = scale * *static_cast<const double*>(loss.const_data_ptr());
  if (result.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(result.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  }
}

}  // namespace fips
