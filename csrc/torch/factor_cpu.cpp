#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/dense_fill.h"
#include "torch/factor.h"

namespace fips {

const Tensor& Factor::dense_transposed() const {
  if (!dense_.has_value()) {
    Tensor dense = make_empty(values(), {view().cols, view().rows});
    cpu::fill_dense_transposed(view(), dense.mutable_data_ptr(), kTorchThreads);
    dense_ = dense;
  }
  return *dense_;
}

Tensor Factor::mm(const Tensor& x, bool transpose, const std::optional<Tensor>& bias) const {
  BlockSparseMmParams p;
  p.v = view();
  p.transpose = transpose;
  p.tokens = x.size(0);
  if (choose_mm_path(mm_shape(p.v, p.tokens)) == MmPath::kDensified) {
    const Tensor weight = transpose ? transposed(dense_transposed()) : dense_transposed();
    return expect_contiguous(call_aten("aten::linear", "", x, weight, bias)[0], x.scalar_type());
  }
  Tensor out = make_empty(x, {p.tokens, p.out_features()});
  const TensorList dense_bias =
      bias.has_value() ? TensorList{torch::stable::contiguous(*bias)} : TensorList{};
  p.x = x.const_data_ptr();
  p.x_stride = p.in_features();
  p.bias = dense_bias.empty() ? nullptr : dense_bias[0].const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.out_stride = p.out_features();
  Tensor workspace = make_empty(x, {cpu::block_sparse_mm_workspace(p)}, ScalarType::Byte);
  cpu::block_sparse_mm(p, workspace.mutable_data_ptr(), kTorchThreads);
  return out;
}

void Factor::add_sddmm(const Tensor& a, const Tensor& b, const Tensor& sums) const {
  const int64_t tokens = a.size(0);
  if (choose_mm_path(mm_shape(view(), tokens)) == MmPath::kDensified) {
    const Tensor dense = token_sum(b, a);  // [n, r]
    GatherParams p;
    p.v = view();
    p.dense = dense.const_data_ptr();
    p.dense_dtype = dtype_of(dense, "product");
    p.out = sums.mutable_data_ptr();
    p.accumulate = true;
    cpu::gather_stored(p, kTorchThreads);
    return;
  }
  BlockSparseSddmmParams p;
  p.v = view();
  p.a = a.const_data_ptr();
  p.a_stride = p.v.rows;
  p.b = b.const_data_ptr();
  p.b_stride = p.v.cols;
  p.tokens = tokens;
  p.out = sums.mutable_data_ptr();
  p.accumulate = true;
  cpu::block_sparse_sddmm(p, kTorchThreads);
}

}  // namespace fips
