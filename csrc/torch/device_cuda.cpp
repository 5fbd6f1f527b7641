#include "torch/device_cuda.h"

#include "kernels/cuda/activation.h"
#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_sddmm.h"
#include "kernels/cuda/dense_fill.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/planner.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/residual.h"
#include "kernels/cuda/shared_mlp_decode.h"
#include "kernels/cuda/shared_mlp_fused.h"
#include "torch/tf32.h"

namespace fips {
namespace {

const cuda::Tuning& tuning() {
  return cuda::tuning_of(cuda::kTuning, cuda::current_device().capability);
}

bool decodes(const SharedMlpParams& params) {
  return params.tokens <= cuda::kDecodeTokens && params.dtype != DType::kFloat64;
}

}  // namespace

Tensor CudaDevice::workspace(int64_t bytes) const {
  return make_empty(like_, {bytes}, ScalarType::Byte);
}

// The index is in device memory; the kernels skip entries that lead outside.
void CudaDevice::check_index(const BlockSparseView&, const char*) const {}

Slice CudaDevice::dequantised(const Slice& slice) const {
  Slice plain = slice;
  BlockSparseView& v = plain.view;
  const std::vector<int64_t> shape = v.is_bitmap() ? std::vector<int64_t>{v.num_values}
                                                   : std::vector<int64_t>{v.num_blocks, v.bn, v.bk};
  // Of a bitmap, nothing writes what pads a block to whole bytes.
  const ScalarType type = scalar_type_of(v.dtype);
  const Tensor values = v.is_bitmap() ? make_zeros(slice.values(), shape, type)
                                      : make_empty(slice.values(), shape, type);
  cuda::dequantise(v, values.mutable_data_ptr(), scope_.stream());
  plain.tensors[0] = values;
  v.values = values.const_data_ptr();
  v.storage = Storage::kPlain;
  v.scales = nullptr;
  return plain;
}

MmPath CudaDevice::mm_path(const MmShape& shape) const {
  return cuda::choose_mm_path(shape, tuning());
}

MmPath CudaDevice::sddmm_path(const MmShape& shape) const {
  return cuda::choose_sddmm_path(shape, tuning());
}

int64_t CudaDevice::chunk_tokens(int64_t hidden, bool gradients) const {
  constexpr int64_t kTile = 256;  // of tokens: the last one of a chunk should be full
  const int64_t elements = int64_t{gradients ? 32 : 128} << 20;
  return max_of(1024, elements / max_of(1, hidden) / kTile * kTile);
}

bool CudaDevice::has_shared_mlp(const SharedMlpParams& params) const {
  if (params.tokens == 0 || decodes(params)) {
    return params.tokens > 0;
  }
  const bool codes = params.up.is_quantised() || params.down.is_quantised() ||
                     (params.gate != nullptr && params.gate->is_quantised());
  if (codes) {
    return false;
  }
  const cuda::DeviceInfo device = cuda::current_device();
  return cuda::prefers_fused_mlp(params, device) && cuda::fuses_shared_mlp(params, device);
}

bool CudaDevice::shared_mlp(const SharedMlpParams& params) const {
  if (decodes(params)) {
    const Tensor memory = workspace(cuda::shared_mlp_decode_workspace_bytes(params));
    cuda::shared_mlp_decode(params, memory.mutable_data_ptr(), scope_.stream());
  } else {
    cuda::shared_mlp_fused(params, scope_.stream());
  }
  return true;
}

bool CudaDevice::block_sparse_mm(const BlockSparseMmParams& params,
                                 const MmEpilogue& epilogue) const {
  BlockSparseMmParams allowed = params;
  allowed.allow_tf32 = params.v.dtype == DType::kFloat32 && tf32_allowed();
  cuda::block_sparse_mm(allowed, epilogue, scope_.stream());
  return true;
}

void CudaDevice::block_sparse_sddmm(const BlockSparseSddmmParams& params) const {
  const Tensor memory = workspace(cuda::block_sparse_sddmm_workspace(params));
  cuda::block_sparse_sddmm(params, memory.mutable_data_ptr(), scope_.stream());
}

void CudaDevice::fill_dense_transposed(const BlockSparseView& v, const Tensor& out) const {
  cuda::fill_dense_transposed(v, out.mutable_data_ptr(), scope_.stream());
}

void CudaDevice::gather_stored(const GatherParams& params) const {
  cuda::gather_stored(params, scope_.stream());
}

void CudaDevice::activation_forward(const ActivationParams& params) const {
  cuda::activation_forward(params, scope_.stream());
}

void CudaDevice::activation_backward(const ActivationParams& params) const {
  cuda::activation_backward(params, scope_.stream());
}

// Halves are multiplied into float32: a sum over thousands of tokens can leave the range of
// float16, and would lose digits of bfloat16.
Tensor CudaDevice::token_sum(const Tensor& a, const Tensor& b) const {
  const ScalarType type = ScalarType::Float;
#if defined(FIPS_HOST_EMULATION)  // torch's CPU has no product of halves into float32
  const Tensor product =
      torch::stable::matmul(transposed(torch::stable::to(a, type)), torch::stable::to(b, type));
#else
  const Tensor product = a.scalar_type() == type
                             ? torch::stable::matmul(transposed(a), b)
                             : call_aten("aten::mm", "dtype", transposed(a), b, type)[0];
#endif
  return expect_contiguous(product, type);
}

void CudaDevice::add_into(const Tensor& sums, const Tensor& values) const {
  cuda::add_into(static_cast<float*>(sums.mutable_data_ptr()), values.const_data_ptr(),
                 dtype_of(values, "values"), values.numel(), scope_.stream());
}

void CudaDevice::add_column_sums(const Tensor& sums, const Tensor& matrix) const {
  cuda::ColumnSumParams p;
  p.matrix = matrix.const_data_ptr();
  p.dtype = dtype_of(matrix, "matrix");
  p.rows = matrix.size(0);
  p.cols = matrix.size(1);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  const Tensor memory = workspace(cuda::add_column_sums_workspace(p));
  cuda::add_column_sums(p, memory.mutable_data_ptr(), scope_.stream());
}

void CudaDevice::scale_into(const Tensor& out, const Tensor& sums, double scale) const {
  cuda::scale_into(out.mutable_data_ptr(), static_cast<const float*>(sums.const_data_ptr()), scale,
                   dtype_of(out, "out"), sums.numel(), scope_.stream());
}

void CudaDevice::add_residual(const Tensor& y, const Tensor& target, const float* weight,
                              const Tensor& loss) const {
  const Tensor row_sums = make_empty(y, {y.size(0)}, ScalarType::Double);
  cuda::ResidualParams p;
  p.dtype = dtype_of(y, "y");
  p.y = y.mutable_data_ptr();
  p.target = target.const_data_ptr();
  p.weight = weight;
  p.rows = y.size(0);
  p.cols = y.size(1);
  p.row_sums = static_cast<double*>(row_sums.mutable_data_ptr());
  p.loss = static_cast<double*>(loss.mutable_data_ptr());
  cuda::weighted_residual(p, scope_.stream());
}

void CudaDevice::scale_loss(const Tensor& result, const Tensor& loss, double scale) const {
  cuda::scale_loss(static_cast<float*>(result.mutable_data_ptr()),
                   static_cast<const double*>(loss.const_data_ptr()), scale, scope_.stream());
}

}  // namespace fips
