#include "kernels/block_sparse_sddmm.h"
#include "kernels/reduce.h"
#include "torch/factor.h"

namespace fips {
namespace {

Tensor block_sparse_sddmm(const Tensor& a, const Tensor& b, const TensorList& v, int64_t rows,
                          int64_t cols) {
  const Factor factor(slice_of(v, rows, cols, a, "v"), "v");
  check_like(b, a, "b");
  FIPS_CHECK(last_dim(a, "a") == rows, "a: last dimension is ", last_dim(a, "a"),
             "; the slice has ", rows, " rows");
  FIPS_CHECK(last_dim(b, "b") == cols, "b: last dimension is ", last_dim(b, "b"),
             "; the slice has ", cols, " columns");
  const Tensor a2 = flatten_tokens(a), b2 = flatten_tokens(b);
  FIPS_CHECK(a2.size(0) == b2.size(0), "b: has ", b2.size(0), " tokens, but a has ", a2.size(0));
  const DType dtype = factor.view().dtype;
  const std::vector<int64_t> shape(factor.values().sizes().begin(), factor.values().sizes().end());
  const Tensor sums = make_zeros(a, shape, accumulator_type(dtype));
  factor.add_sddmm(a2, b2, sums);
  if (sums.scalar_type() == a.scalar_type()) {
    return sums;
  }
  Tensor out = make_empty(a, shape);
  cpu::scale_into(out.mutable_data_ptr(), sums.const_data_ptr(), 1.0, dtype, sums.numel(),
                  kTorchThreads);
  return out;
}

}  // namespace
}  // namespace fips

STABLE_TORCH_LIBRARY_IMPL(fips, CPU, m) {
  m.impl("block_sparse_sddmm", TORCH_BOX(&fips::block_sparse_sddmm));
}
