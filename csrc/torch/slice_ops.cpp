// block_sparse_mm and block_sparse_sddmm.
#include "torch/device_ops.h"
#include "torch/factor.h"

namespace fips {

Tensor block_sparse_mm(const Device& device, const Tensor& x, const TensorList& v, int64_t rows,
                       int64_t cols, bool transpose, const std::optional<Tensor>& bias) {
  const Factor factor(device, slice_of(v, rows, cols, x, "v"), "v");
  const int64_t in = transpose ? cols : rows, out = transpose ? rows : cols;
  FIPS_CHECK(last_dim(x, "x") == in, "x: last dimension is ", last_dim(x, "x"),
             ", but the slice is ", rows, " x ", cols, transpose ? " (transposed)" : "",
             " and takes ", in);
  check_vector(bias, out, x, "bias");
  return torch::stable::reshape(factor.mm(token_rows(x), transpose, bias), with_last_dim(x, out));
}

Tensor block_sparse_sddmm(const Device& device, const Tensor& a, const Tensor& b,
                          const TensorList& v, int64_t rows, int64_t cols) {
  const Factor factor(device, slice_of(v, rows, cols, a, "v"), "v");
  factor.check_trainable();
  check_like(b, a, "b");
  FIPS_CHECK(last_dim(a, "a") == rows, "a: last dimension is ", last_dim(a, "a"),
             "; the slice has ", rows, " rows");
  FIPS_CHECK(last_dim(b, "b") == cols, "b: last dimension is ", last_dim(b, "b"),
             "; the slice has ", cols, " columns");
  const Tensor a2 = flatten_tokens(a), b2 = flatten_tokens(b);
  FIPS_CHECK(a2.size(0) == b2.size(0), "b: has ", b2.size(0), " tokens, but a has ", a2.size(0));
  const std::vector<int64_t> shape(factor.values().sizes().begin(), factor.values().sizes().end());
  const Tensor sums = make_zeros(a, shape, accumulator_type(factor.view().dtype));
  factor.add_sddmm(a2, b2, sums);
  if (sums.scalar_type() == a.scalar_type()) {
    return sums;
  }
  Tensor out = make_empty(a, shape);
  device.scale_into(out, sums, 1.0);
  return out;
}

}  // namespace fips
