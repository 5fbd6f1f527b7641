#include "kernels/cuda/block_sparse_mm.h"
#include "torch/cuda_scope.h"
#include "torch/tensor_utils.h"

namespace fips {
namespace {

// x as [tokens, features] with contiguous features: a view wherever the strides allow it.
Tensor token_rows(const Tensor& x) {
  const int64_t features = last_dim(x, "x");
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    tokens *= x.size(i);
  }
  const Tensor rows = torch::stable::reshape(x, {tokens, features});
  return features <= 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// The slice's indices stay on the device and are not read here: the kernels skip entries out of
// range.
Tensor block_sparse_mm_cuda(const Tensor& x, const TensorList& v, int64_t rows, int64_t cols,
                            bool transpose, const std::optional<Tensor>& bias) {
  const CudaScope scope(x);
  const Slice slice = slice_of(v, rows, cols, x, "v");
  const int64_t in = transpose ? cols : rows, out = transpose ? rows : cols;
  FIPS_CHECK(last_dim(x, "x") == in, "x: last dimension is ", last_dim(x, "x"),
             ", but the slice is ", rows, " x ", cols, transpose ? " (transposed)" : "",
             " and takes ", in);
  check_vector(bias, out, x, "bias");
  const Tensor x_rows = token_rows(x);
  const Tensor y = make_empty(x, with_last_dim(x, out));
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = torch::stable::contiguous(*bias);
  }
  BlockSparseMmParams params;
  params.v = slice.view;
  params.transpose = transpose;
  params.x = x_rows.const_data_ptr();
  params.tokens = x_rows.size(0);
  params.x_stride = x_rows.stride(0);
  params.bias = bias_row.has_value() ? bias_row->const_data_ptr() : nullptr;
  params.out = y.mutable_data_ptr();
  params.out_stride = out;
  cuda::block_sparse_mm(params, {}, scope.stream());
  return y;
}

}  // namespace
}  // namespace fips

FIPS_CUDA_LIBRARY(m) { m.impl("block_sparse_mm", TORCH_BOX(&fips::block_sparse_mm_cuda)); }
