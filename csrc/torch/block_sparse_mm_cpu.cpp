#include "kernels/block_sparse_mm.h"
#include "torch/factor.h"

namespace fips {
namespace {

Tensor block_sparse_mm(const Tensor& x, const TensorList& v, int64_t rows, int64_t cols,
                       bool transpose, const std::optional<Tensor>& bias) {
  const Factor factor(slice_of(v, rows, cols, x, "v"), "v");
  const int64_t in = transpose ? cols : rows, out = transpose ? rows : cols;
  FIPS_CHECK(last_dim(x, "x") == in, "x: last dimension is ", last_dim(x, "x"),
             ", but the slice is ", rows, " x ", cols, transpose ? " (transposed)" : "",
             " and takes ", in);
  check_vector(bias, out, x, "bias");
  return torch::stable::reshape(factor.mm(flatten_tokens(x), transpose, bias),
                                with_last_dim(x, out));
}

}  // namespace
}  // namespace fips

STABLE_TORCH_LIBRARY_IMPL(fips, CPU, m) {
  m.impl("block_sparse_mm", TORCH_BOX(&fips::block_sparse_mm));
}
