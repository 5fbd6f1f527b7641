// The ops on slices, for any device: validated arguments, then the classes that do the work. One
// list registers them all for a device.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "torch/device.h"

namespace fips {

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor block_sparse_mm(const Device& device, const Tensor& x, const TensorList& v, int64_t rows,
                       int64_t cols, bool transpose, const std::optional<Tensor>& bias);

Tensor block_sparse_sddmm(const Device& device, const Tensor& a, const Tensor& b,
                          const TensorList& v, int64_t rows, int64_t cols);

Tensor shared_mlp(const Device& device, const Tensor& x, const Tensor& base,
                  const std::optional<Tensor>& base_out, const TensorList& up,
                  const std::optional<TensorList>& gate, const TensorList& down,
                  const std::optional<Tensor>& up_bias, const std::optional<Tensor>& gate_bias,
                  const std::optional<Tensor>& down_bias, int64_t hidden, std::string activation,
                  bool identity);

NineTensors shared_mlp_backward(const Device& device, const Tensor& grad_y, const Tensor& x,
                                const Tensor& base, const std::optional<Tensor>& base_out,
                                const TensorList& up, const std::optional<TensorList>& gate,
                                const TensorList& down, const std::optional<Tensor>& up_bias,
                                const std::optional<Tensor>& gate_bias,
                                const std::optional<Tensor>& down_bias, int64_t hidden,
                                std::string activation, bool identity);

NineTensors reconstruction_loss(const Device& device, const Tensor& x, const Tensor& target,
                                const std::optional<Tensor>& token_weight, double scale,
                                const Tensor& base, const std::optional<Tensor>& base_out,
                                const TensorList& up, const std::optional<TensorList>& gate,
                                const TensorList& down, const std::optional<Tensor>& up_bias,
                                const std::optional<Tensor>& gate_bias,
                                const std::optional<Tensor>& down_bias, int64_t hidden,
                                std::string activation, bool identity);

// `kOp` on the device D of its first tensor.
template <class D, auto kOp>
struct OnDevice;

template <class D, class Result, class... Args,
          Result (*kOp)(const Device&, const Tensor&, Args...)>
struct OnDevice<D, kOp> {
  static Result call(const Tensor& first, Args... args) {
    const D device(first);
    return kOp(device, first, args...);
  }
};

template <class D>
class DeviceOps {
  template <auto kOp>
  static constexpr auto on_device = &OnDevice<D, kOp>::call;

 public:
  template <class Library>
  static void register_in(Library& library) {
    library.impl("block_sparse_mm", TORCH_BOX(on_device<block_sparse_mm>));
    library.impl("block_sparse_sddmm", TORCH_BOX(on_device<block_sparse_sddmm>));
    library.impl("shared_mlp", TORCH_BOX(on_device<shared_mlp>));
    library.impl("shared_mlp_backward", TORCH_BOX(on_device<shared_mlp_backward>));
    library.impl("reconstruction_loss", TORCH_BOX(on_device<reconstruction_loss>));
  }
};

}  // namespace fips
