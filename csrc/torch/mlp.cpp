#include "torch/mlp.h"

#include "kernels/block_sparse_mm.h"
#include "kernels/reduce.h"
#include "kernels/skinny_mm.h"
#include "torch/scratch.h"

namespace fips {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor checked_base(const Tensor& base, const Tensor& x, const char* name) {
  check_like(base, x, name);
  FIPS_CHECK(base.dim() == 2 && base.size(0) == last_dim(x, "x"), name, ": expected shape [",
             last_dim(x, "x"), ", r] to match x, got ", shape_of(base));
  return contiguous_of(base);
}

// Rows of the slices over `base`: its columns, and d more for the identity part.
int64_t slice_rows(const Tensor& base, bool identity) {
  return base.size(1) + (identity ? base.size(0) : 0);
}

const void* pointer_of(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

OptionalTensor optional_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(contiguous_of(*t)) : std::nullopt;
}

}  // namespace

Mlp::Mlp(const Device& device, const Tensor& x, const Tensor& base, const OptionalTensor& base_out,
         const TensorList& up, const std::optional<TensorList>& gate, const TensorList& down,
         const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
         const OptionalTensor& down_bias, int64_t hidden, const std::string& activation,
         bool identity)
    : device_(device),
      width_(last_dim(x, "x")),
      identity_(identity),
      activation_(parse_activation(activation)),
      base_(checked_base(base, x, "base")),
      base_out_(base_out.has_value() ? OptionalTensor(checked_base(*base_out, x, "base_out"))
                                     : std::nullopt),
      up_(device, slice_of(up, slice_rows(base, identity), hidden, x, "up"), "up"),
      down_(device,
            slice_of(down, slice_rows(base_out.has_value() ? *base_out : base, identity), hidden, x,
                     "down"),
            "down"),
      up_bias_(optional_contiguous(up_bias)),
      gate_bias_(optional_contiguous(gate_bias)),
      down_bias_(optional_contiguous(down_bias)) {
  if (gate.has_value()) {
    gate_.emplace(device, slice_of(*gate, slice_rows(base, identity), hidden, x, "gate"), "gate");
  }
  FIPS_CHECK(gate.has_value() || !gate_bias.has_value(),
             "gate_bias: given without gate; leave it None");
  check_vector(up_bias, hidden, x, "up_bias");
  check_vector(gate_bias, hidden, x, "gate_bias");
  check_vector(down_bias, width_, x, "down_bias");
}

int64_t Mlp::chunk_tokens() const { return device_.chunk_tokens(up_.stored().cols, true); }

void Mlp::add_product(const Tensor& sums, const Tensor& a, const Tensor& b) const {
  if (sums.numel() > 0) {
    device_.add_into(sums, device_.token_sum(a, b));
  }
}

void Mlp::add_columns(const OptionalTensor& sums, const Tensor& matrix) const {
  if (sums.has_value()) {
    device_.add_column_sums(*sums, matrix);
  }
}

Tensor Mlp::project_in(const Tensor& x, const Tensor& base) const {
  if (!identity_) {
    return torch::stable::matmul(x, base);
  }
  if (base.size(1) == 0) {
    return x;
  }
  return call_aten("aten::cat", "", TensorList{torch::stable::matmul(x, base), x}, int64_t{1})[0];
}

Mlp::Hidden Mlp::pre_activations(const Tensor& x) const {
  Tensor z = project_in(x, base_);
  Tensor up = up_.mm(z, false, up_bias_);
  OptionalTensor gate =
      gate_.has_value() ? OptionalTensor(gate_->mm(z, false, gate_bias_)) : std::nullopt;
  return {z, up, gate};
}

Tensor Mlp::forward(const Tensor& x) const {
  SharedMlpParams whole = params(x);
  const int64_t chunk = device_.chunk_tokens(up_.stored().cols, false);
  const bool has_kernel = device_.has_shared_mlp(whole);
  if (!has_kernel && x.size(0) <= chunk) {
    return forward_chain(x);
  }
  const Tensor y = make_empty(x, {x.size(0), width_});
  if (!has_kernel) {
    for_each_chunk(x.size(0), chunk, [&](int64_t first, int64_t count) {
      copy_rows_into(y, first, forward_chain(range_of(x, first, count)));
    });
    return y;
  }
  whole.y = y.mutable_data_ptr();
  if (!device_.shared_mlp(whole)) {
    up_.verify();
    if (gate_.has_value()) {
      gate_->verify();
    }
    down_.verify();
  }
  return y;
}

Tensor Mlp::forward_chain(const Tensor& x) const {
  const Tensor h = up_.mm_activated(project_in(x, base_), up_bias_,
                                    gate_.has_value() ? &*gate_ : nullptr, gate_bias_, activation_);
  const Tensor w = down_.mm(h, true);
  const Tensor& base = out_base();
  const int64_t rank = base.size(1);
  if (!identity_) {
    return call_aten("aten::linear", "", w, base, down_bias_)[0];
  }
  // y = w_U U^T + b + w_I
  Tensor y = contiguous_of(columns(w, rank, width_));
  if (rank > 0) {
    y = torch::stable::subtract(y, torch::stable::matmul(columns(w, 0, rank), transposed(base)),
                                -1.0);
  }
  return down_bias_.has_value() ? torch::stable::subtract(y, *down_bias_, -1.0) : y;
}

SharedMlpParams Mlp::params(const Tensor& x) const {
  SharedMlpParams p;
  p.dtype = dtype();
  p.width = width_;
  p.x = x.const_data_ptr();
  p.tokens = x.size(0);
  p.x_stride = width_;
  p.base = base_.const_data_ptr();
  p.base_out = out_base().const_data_ptr();
  p.rank = base_.size(1);
  p.rank_out = out_base().size(1);
  p.identity = identity_;
  p.up = up_.stored();
  p.gate = gate_.has_value() ? &gate_->stored() : nullptr;
  p.down = down_.stored();
  p.up_bias = pointer_of(up_bias_);
  p.gate_bias = pointer_of(gate_bias_);
  p.down_bias = pointer_of(down_bias_);
  p.activation = activation_;
  p.y_stride = width_;
  return p;
}

MlpGradients Mlp::zero_gradients(const Tensor& like) const {
  up_.check_trainable();
  if (gate_.has_value()) {
    gate_->check_trainable();
  }
  down_.check_trainable();
  const ScalarType type = accumulator_type(dtype());
  auto zeros = [&](const Tensor& t) {
    return make_zeros(like, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), type);
  };
  auto maybe = [&](const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(zeros(*t)) : std::nullopt;
  };
  MlpGradients sums;
  sums.base = zeros(base_);
  sums.base_out = maybe(base_out_);
  sums.up = zeros(up_.values());
  sums.gate = gate_.has_value() ? OptionalTensor(zeros(gate_->values())) : std::nullopt;
  sums.down = zeros(down_.values());
  sums.up_bias = maybe(up_bias_);
  sums.gate_bias = maybe(gate_bias_);
  sums.down_bias = maybe(down_bias_);
  return sums;
}

OptionalTensor Mlp::backward(const Tensor& grad_y, const Tensor& x, const MlpGradients& sums,
                             bool need_dx) const {
  const Hidden hidden = pre_activations(x);
  const Tensor& base = out_base();
  const int64_t rank = base_.size(1), rank_out = base.size(1);

  add_columns(sums.down_bias, grad_y);
  const Tensor dw = project_in(grad_y, base);
  const Tensor dh = down_.mm(dw, false);

  // Overwrites the pre-activations with their gradients and recomputes h.
  const Tensor h = make_empty(x, {x.size(0), up_.stored().cols});
  ActivationParams p;
  p.activation = activation_;
  p.dtype = dtype();
  p.count = h.numel();
  p.up = hidden.up.mutable_data_ptr();
  p.gate = hidden.gate.has_value() ? hidden.gate->mutable_data_ptr() : nullptr;
  p.grad_h = dh.const_data_ptr();
  p.h = h.mutable_data_ptr();
  device_.activation_backward(p);

  down_.add_sddmm(dw, h, *sums.down);
  if (rank_out > 0) {
    const Tensor w = down_.mm(h, true);
    add_product(sums.base_out.has_value() ? *sums.base_out : *sums.base, grad_y,
                columns(w, 0, rank_out));
  }

  up_.add_sddmm(hidden.z, hidden.up, *sums.up);
  add_columns(sums.up_bias, hidden.up);
  Tensor dz = up_.mm(hidden.up, true);
  if (gate_.has_value()) {
    gate_->add_sddmm(hidden.z, *hidden.gate, *sums.gate);
    add_columns(sums.gate_bias, *hidden.gate);
    dz = torch::stable::subtract(dz, gate_->mm(*hidden.gate, true), -1.0);
  }
  const Tensor dz_base = columns(dz, 0, rank);
  add_product(*sums.base, x, dz_base);
  if (!need_dx) {
    return std::nullopt;
  }
  if (!identity_) {
    return torch::stable::matmul(dz_base, transposed(base_));
  }
  const Tensor dx = columns(dz, rank, width_);
  return rank == 0
             ? contiguous_of(dx)
             : torch::stable::subtract(dx, torch::stable::matmul(dz_base, transposed(base_)), -1.0);
}

std::vector<Tensor> Mlp::finish(const MlpGradients& sums, double scale, DType dtype,
                                const Tensor& like) const {
  const ScalarType type = dtype == this->dtype() ? like.scalar_type() : accumulator_type(dtype);
  std::vector<Tensor> gradients;
  for (const OptionalTensor* sum : {&sums.base, &sums.base_out, &sums.up, &sums.gate, &sums.down,
                                    &sums.up_bias, &sums.gate_bias, &sums.down_bias}) {
    if (!sum->has_value()) {
      gradients.push_back(make_empty(like, {0}, type));
      continue;
    }
    const Tensor& t = **sum;
    Tensor gradient =
        make_empty(like, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), type);
    device_.scale_into(gradient, t, scale);
    gradients.push_back(gradient);
  }
  return gradients;
}

}  // namespace fips
