// shared_mlp, its gradients and the reconstruction loss: thin wrappers around Mlp.
#include "torch/device_ops.h"
#include "torch/mlp.h"

namespace fips {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Calls body(first, count) for chunks of tokens.
template <class F>
void for_each_chunk(int64_t tokens, int64_t chunk, const F& body) {
  for (int64_t first = 0; first < tokens; first += chunk) {
    body(first, min_of(chunk, tokens - first));
  }
}

Tensor range_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor base = t;
  return torch::stable::narrow(base, 0, first, count);
}

void copy_rows_into(const Tensor& all, int64_t first, const Tensor& part) {
  Tensor target = range_of(all, first, part.size(0));
  torch::stable::copy_(target, part);
}

NineTensors with_gradients(const Tensor& first, const std::vector<Tensor>& g) {
  return {first, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

}  // namespace

Tensor shared_mlp(const Device& device, const Tensor& x, const Tensor& base,
                  const OptionalTensor& base_out, const TensorList& up,
                  const std::optional<TensorList>& gate, const TensorList& down,
                  const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                  const OptionalTensor& down_bias, int64_t hidden, std::string activation,
                  bool identity) {
  const Mlp mlp(device, x, base, base_out, up, gate, down, up_bias, gate_bias, down_bias, hidden,
                activation, identity);
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor tokens = flatten_tokens(x);
  if (tokens.size(0) <= mlp.chunk_tokens()) {
    return torch::stable::reshape(mlp.forward(tokens), shape);
  }
  const Tensor y = make_empty(tokens, {tokens.size(0), mlp.width()});
  for_each_chunk(tokens.size(0), mlp.chunk_tokens(), [&](int64_t first, int64_t count) {
    copy_rows_into(y, first, mlp.forward(range_of(tokens, first, count)));
  });
  return torch::stable::reshape(y, shape);
}

NineTensors shared_mlp_backward(const Device& device, const Tensor& grad_y, const Tensor& x,
                                const Tensor& base, const OptionalTensor& base_out,
                                const TensorList& up, const std::optional<TensorList>& gate,
                                const TensorList& down, const OptionalTensor& up_bias,
                                const OptionalTensor& gate_bias, const OptionalTensor& down_bias,
                                int64_t hidden, std::string activation, bool identity) {
  const Mlp mlp(device, x, base, base_out, up, gate, down, up_bias, gate_bias, down_bias, hidden,
                activation, identity);
  check_like(grad_y, x, "grad_y");
  FIPS_CHECK(shape_of(grad_y) == shape_of(x), "grad_y: shape is ", shape_of(grad_y),
             "; expected that of x, ", shape_of(x));
  const Tensor tokens = flatten_tokens(x), grads = flatten_tokens(grad_y);
  const MlpGradients sums = mlp.zero_gradients(x);
  const Tensor dx = make_empty(tokens, {tokens.size(0), mlp.width()});
  for_each_chunk(tokens.size(0), mlp.chunk_tokens(), [&](int64_t first, int64_t count) {
    copy_rows_into(
        dx, first,
        *mlp.backward(range_of(grads, first, count), range_of(tokens, first, count), sums, true));
  });
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  return with_gradients(torch::stable::reshape(dx, shape), mlp.finish(sums, 1.0, mlp.dtype(), x));
}

NineTensors reconstruction_loss(const Device& device, const Tensor& x, const Tensor& target,
                                const OptionalTensor& token_weight, double scale,
                                const Tensor& base, const OptionalTensor& base_out,
                                const TensorList& up, const std::optional<TensorList>& gate,
                                const TensorList& down, const OptionalTensor& up_bias,
                                const OptionalTensor& gate_bias, const OptionalTensor& down_bias,
                                int64_t hidden, std::string activation, bool identity) {
  const Mlp mlp(device, x, base, base_out, up, gate, down, up_bias, gate_bias, down_bias, hidden,
                activation, identity);
  check_like(target, x, "target");
  FIPS_CHECK(shape_of(target) == shape_of(x), "target: shape is ", shape_of(target),
             "; expected that of x, ", shape_of(x));
  const Tensor tokens = flatten_tokens(x), wanted = flatten_tokens(target);
  TensorList weight;
  if (token_weight.has_value()) {
    check_same_device(*token_weight, x, "token_weight");
    FIPS_CHECK(
        token_weight->scalar_type() == ScalarType::Float && token_weight->numel() == tokens.size(0),
        "token_weight: expected float32 with one entry for each of the ", tokens.size(0),
        " tokens, got ", torch::headeronly::toString(token_weight->scalar_type()), " ",
        shape_of(*token_weight));
    weight.push_back(contiguous_of(*token_weight));
  }
  const MlpGradients sums = mlp.zero_gradients(x);
  const Tensor loss = make_zeros(x, {}, ScalarType::Double);
  for_each_chunk(tokens.size(0), mlp.chunk_tokens(), [&](int64_t first, int64_t count) {
    const Tensor rows = range_of(tokens, first, count);
    const Tensor residual = expect_contiguous(mlp.forward(rows), x.scalar_type());
    const float* row_weight =
        weight.empty() ? nullptr : static_cast<const float*>(weight[0].const_data_ptr()) + first;
    device.add_residual(residual, range_of(wanted, first, count), row_weight, loss);
    // The residual goes back unscaled: 2 * scale would underflow in float16.
    mlp.backward(residual, rows, sums, false);
  });
  // Gradients stay in the accumulator type: a normalised loss has a tiny scale, which float16 could
  // not hold.
  const DType sum_type = mlp.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const Tensor result = make_empty(x, {}, accumulator_type(mlp.dtype()));
  device.scale_loss(result, loss, scale);
  return with_gradients(result, mlp.finish(sums, 2.0 * scale, sum_type, x));
}

}  // namespace fips
