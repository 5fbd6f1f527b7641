// Small factorisations on a GPU that never wait for it.
#pragma once

#include <optional>

#include "kernels/cuda/jacobi.h"
#include "torch/tensor_utils.h"

namespace fips {

// Relative to the trace, added to the diagonal of a float64 Gram matrix before its Cholesky
// factorisation. Above the rounding of the product and of the factorisation, about
// 2^-53 * sqrt(rows) * trace for both, so that the factorisation cannot break down.
inline constexpr double kCholeskyLift = 1e-12;
// For a zero matrix, whose trace gives no scale.
inline constexpr double kSmallestLift = 1e-300;

// L of a = L L^T, lower triangular; without the check that would wait for the GPU.
inline Tensor cholesky(const Tensor& a) {
  return call_aten<2>("aten::linalg_cholesky_ex", "", a, false, false)[0];
}

struct SmallSvd {
  std::optional<Tensor> left;  // [batch, vectors, vectors], left singular vectors as rows
  Tensor values, right;        // [batch, vectors] descending; [batch, vectors, length], rows
};

// Of each contiguous matrix a [batch, vectors, length] in float32 or float64, vectors <=
// cuda::kJacobiMaxVectors.
inline SmallSvd small_svd(const Tensor& a, bool want_left, cuda::Stream stream) {
  const int64_t batch = a.size(0), vectors = a.size(1), length = a.size(2);
  SmallSvd svd{std::nullopt, make_empty(a, {batch, vectors}),
               make_empty(a, {batch, vectors, length})};
  cuda::JacobiParams params;
  params.batch = batch;
  params.vectors = vectors;
  params.length = length;
  params.dtype = dtype_of(a, "a");
  params.matrices = a.const_data_ptr();
  if (want_left) {
    svd.left = make_empty(a, {batch, vectors, vectors});
    params.left = svd.left->mutable_data_ptr();
  }
  params.values = svd.values.mutable_data_ptr();
  params.right = svd.right.mutable_data_ptr();
  const Tensor workspace = make_empty(a, {cuda::jacobi_workspace_bytes(params)}, ScalarType::Byte);
  cuda::jacobi_svd(params, workspace.mutable_data_ptr(), stream);
  return svd;
}

}  // namespace fips
