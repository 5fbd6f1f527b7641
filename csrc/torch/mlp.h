// The MLP on shared factors: forward and backward over a range of tokens. shared_mlp
// and reconstruction_loss are thin wrappers around this class.
#pragma once

#include "torch/factor.h"

namespace fips {

// Gradient sums in the accumulator type, over any number of backward() calls.
struct MlpGradients {
  std::optional<Tensor> base, base_out, up, gate, down, up_bias, gate_bias, down_bias;
};

class Mlp {
 public:
  // Validates everything; `x` fixes the dtype, `device` is its device and outlives the MLP.
  Mlp(const Device& device, const Tensor& x, const Tensor& base,
      const std::optional<Tensor>& base_out, const TensorList& up,
      const std::optional<TensorList>& gate, const TensorList& down,
      const std::optional<Tensor>& up_bias, const std::optional<Tensor>& gate_bias,
      const std::optional<Tensor>& down_bias, int64_t hidden, const std::string& activation,
      bool identity);

  int64_t width() const { return width_; }
  DType dtype() const { return up_.stored().dtype; }

  // Tokens per call of backward() so that its [tokens, hidden] activations stay small.
  int64_t chunk_tokens() const;

  // y [t, d] for x [t, d], contiguous.
  Tensor forward(const Tensor& x) const;

  MlpGradients zero_gradients(const Tensor& like) const;

  // Adds the gradients of one range of tokens; returns dx, or nothing when `need_dx` is false.
  std::optional<Tensor> backward(const Tensor& grad_y, const Tensor& x, const MlpGradients& sums,
                                 bool need_dx) const;

  // The sums times `scale`, rounded to `dtype`, in the order of the schemas; absent ones are empty.
  std::vector<Tensor> finish(const MlpGradients& sums, double scale, DType dtype,
                             const Tensor& like) const;

 private:
  struct Hidden {
    Tensor z, up;                // [t, rows], [t, n]
    std::optional<Tensor> gate;  // [t, n]
  };
  SharedMlpParams params(const Tensor& x) const;  // without y
  Tensor forward_chain(const Tensor& x) const;    // product by product
  const Tensor& out_base() const { return base_out_.has_value() ? *base_out_ : base_; }
  void add_product(const Tensor& sums, const Tensor& a, const Tensor& b) const;
  void add_columns(const std::optional<Tensor>& sums, const Tensor& matrix) const;
  Tensor project_in(const Tensor& x, const Tensor& base) const;
  Hidden pre_activations(const Tensor& x) const;

  const Device& device_;
  int64_t width_;
  bool identity_;
  Activation activation_;
  Tensor base_;
  std::optional<Tensor> base_out_;
  Factor up_, down_;
  std::optional<Factor> gate_;
  std::optional<Tensor> up_bias_, gate_bias_, down_bias_;
};

}  // namespace fips
