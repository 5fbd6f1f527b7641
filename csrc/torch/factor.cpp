#include "torch/factor.h"

namespace fips {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kVerifiedTokens = 32;  // from here on, validating the index is lost in the noise

}  // namespace

const BlockSparseView& Factor::view() const {
  if (!stored().is_quantised() || device_.reads_codes()) {
    return stored();
  }
  if (!plain_.has_value()) {
    plain_ = device_.dequantised(slice_);
  }
  return plain_->view;
}

void Factor::verify() const {
  if (!verified_) {
    device_.check_index(stored(), name_);
    verified_ = true;
  }
}

void Factor::check_trainable() const {
  FIPS_CHECK(!stored().is_quantised(), name_,
             ": its values are quantised and have no gradient; train the float values, or take "
             "BlockSparse.dequantised()");
}

const Tensor& Factor::dense_transposed() const {
  if (!dense_.has_value()) {
    verify();  // the filling follows the index
    const std::vector<int64_t> shape{stored().cols, stored().rows};
    Tensor dense = make_empty(values(), shape, scalar_type_of(stored().dtype));
    device_.fill_dense_transposed(view(), dense);
    dense_ = dense;
  }
  return *dense_;
}

bool Factor::is_sparse(int64_t tokens) const {
  if (tokens >= kVerifiedTokens) {
    verify();
  }
  return device_.mm_path(mm_shape(stored(), tokens)) == MmPath::kSparse;
}

Tensor Factor::run(const Tensor& x, bool transpose, const OptionalTensor& bias, const Factor* gate,
                   const OptionalTensor& gate_bias, Activation activation) const {
  BlockSparseMmParams p;
  p.v = view();
  p.transpose = transpose;
  p.tokens = x.size(0);
  Tensor out = make_empty(x, {p.tokens, p.out_features()});
  TensorList keep_alive;
  auto pointer = [&](const OptionalTensor& t) -> const void* {
    if (!t.has_value()) {
      return nullptr;
    }
    keep_alive.push_back(contiguous_of(*t));
    return keep_alive.back().const_data_ptr();
  };
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  p.bias = pointer(bias);
  p.out = out.mutable_data_ptr();
  p.out_stride = p.out_features();
  MmEpilogue epilogue;
  epilogue.activation = activation;
  if (gate != nullptr) {
    epilogue.gate = &gate->view();
    epilogue.gate_bias = pointer(gate_bias);
  }
  if (!device_.block_sparse_mm(p, epilogue)) {
    verify();
    if (gate != nullptr) {
      gate->verify();
    }
  }
  return out;
}

Tensor Factor::mm(const Tensor& x, bool transpose, const OptionalTensor& bias) const {
  if (is_sparse(x.size(0))) {
    return run(x, transpose, bias, nullptr, std::nullopt, Activation::kIdentity);
  }
  const Tensor weight = transpose ? transposed(dense_transposed()) : dense_transposed();
  return expect_contiguous(call_aten("aten::linear", "", x, weight, bias)[0], x.scalar_type());
}

Tensor Factor::mm_activated(const Tensor& x, const OptionalTensor& bias, const Factor* gate,
                            const OptionalTensor& gate_bias, Activation activation) const {
  const int64_t tokens = x.size(0);
  if (is_sparse(tokens) && (gate == nullptr || (gate->is_sparse(tokens) && is_like(*gate)))) {
    return run(x, false, bias, gate, gate_bias, activation);
  }
  const Tensor up = mm(x, false, bias);
  ActivationParams p;
  p.activation = activation;
  p.dtype = stored().dtype;
  p.count = up.numel();
  p.up = p.h = up.mutable_data_ptr();
  Tensor gated;
  if (gate != nullptr) {
    gated = gate->mm(x, false, gate_bias);
    p.gate = gated.mutable_data_ptr();
  }
  device_.activation_forward(p);
  return up;
}

void Factor::add_sddmm(const Tensor& a, const Tensor& b, const Tensor& sums) const {
  check_trainable();
  verify();
  const int64_t tokens = a.size(0);
  if (device_.sddmm_path(mm_shape(view(), tokens)) == MmPath::kDensified) {
    const Tensor dense = device_.token_sum(b, a);  // [n, r]
    GatherParams p;
    p.v = view();
    p.dense = dense.const_data_ptr();
    p.dense_dtype = dtype_of(dense, "product");
    p.out = sums.mutable_data_ptr();
    p.accumulate = true;
    device_.gather_stored(p);
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
  device_.block_sparse_sddmm(p);
}

}  // namespace fips
