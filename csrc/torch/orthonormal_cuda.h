// Orthonormal bases on a GPU, by Cholesky factors of Gram matrices: products and triangular solves
// instead of one Householder step per column.
//
// One factorisation loses orthogonality with the square of the condition number, and fails from
// 1 / sqrt(epsilon) on. Three things make it stand for any matrix without looking at a result,
// which would wait for the GPU:
// - Gram matrix, factor and solve are float64 (mixed precision as in Yamazaki, Tomov, Dongarra,
// SIAM
//   J. Sci. Comput. 2015). Data-centre GPUs multiply float64 as fast as float32; elsewhere these
//   products are few. TF32, if torch allows it, does not reach them.
// - Noise of the size of rounding errors makes the matrix full rank, zero matrices included.
// - A lift of the diagonal (Fukaya et al., SIAM J. Sci. Comput. 2020) keeps the factor finite. A
//   lifted pass raises relative singular values below 1e-6 by 1e6 and brings the others to 1.
#pragma once

#include "kernels/cuda/diagonal.h"
#include "kernels/cuda/gaussian.h"
#include "torch/jacobi_cuda.h"
#include "torch/tensor_utils.h"

namespace fips {

// y ~ scale * q * factor^T
struct RoughBasis {
  Tensor q;       // [batch, m, n] float64, well conditioned
  Tensor factor;  // [batch, n, n] float64, lower triangular
  Tensor scale;   // [batch] in y's type: the largest magnitude
};

// q L^T = y for lower triangular L.
inline Tensor solve_transposed(const Tensor& factor, const Tensor& y) {
  constexpr bool kUpper = true, kLeft = false, kUnitriangular = false;
  return call_aten("aten::linalg_solve_triangular", "", transposed(factor), y, kUpper, kLeft,
                   kUnitriangular)[0];
}

class Orthonormaliser {
 public:
  Orthonormaliser(uint64_t seed, cuda::Stream stream)
      : seed_(seed + kNoiseStream), stream_(stream) {}

  // Columns kept apart down to relative singular values of 1e-6: enough between power iterations.
  // y [batch, m, n], m >= n, float32 or float64.
  RoughBasis rough(const Tensor& y) {
    const Tensor scale = largest_magnitude(y);
    return pass(full_rank(y, scale), scale, kCholeskyLift);
  }

  // Orthonormal to float64 rounding, in float64, whatever the rank of y. The smallest relative
  // singular value starts at about epsilon / m; two lifted passes in float32, four in float64,
  // bring it to where a pass without lift is exact.
  Tensor exact(const Tensor& y) {
    const int passes = y.scalar_type() == ScalarType::Double ? 4 : 2;
    RoughBasis basis = rough(y);
    for (int i = 1; i < passes; ++i) {
      basis = pass(basis.q, basis.scale, kCholeskyLift);
    }
    return pass(basis.q, basis.scale, 0.0).q;
  }

 private:
  static constexpr uint64_t kNoiseStream = 0x9E3779B97F4A7C15u;  // apart from the caller's samples

  static Tensor largest_magnitude(const Tensor& y) {
    const std::vector<int64_t> matrix{1, 2};
    return torch::stable::amax(call_aten("aten::abs", "", y)[0], matrix);
  }

  // y / scale + noise; every call draws its own.
  Tensor full_rank(const Tensor& y, const Tensor& scale) {
    const Tensor from = contiguous_of(y);
    const double epsilon = y.scalar_type() == ScalarType::Double ? 0x1p-52 : 0x1p-23;
    const Tensor out =
        make_empty(from, {from.size(0), from.size(1), from.size(2)}, ScalarType::Double);
    cuda::scaled_with_noise(from.const_data_ptr(), scale.const_data_ptr(),
                            static_cast<double*>(out.mutable_data_ptr()), from.size(0),
                            from.size(1) * from.size(2), dtype_of(from, "y"), 4 * epsilon, seed_++,
                            stream_);
    return out;
  }

  RoughBasis pass(const Tensor& y, const Tensor& scale, double lift) const {
    const Tensor gram =
        expect_contiguous(torch::stable::matmul(transposed(y), y), ScalarType::Double);
    const int64_t width = gram.size(1);
    if (lift > 0) {
      cuda::add_to_diagonal(gram.mutable_data_ptr(), gram.size(0), width, DType::kFloat64,
                            lift * static_cast<double>(width), 0.0, nullptr, stream_);
    }
    const Tensor factor = cholesky(gram);
    return {solve_transposed(factor, y), factor, scale};
  }

  uint64_t seed_;
  cuda::Stream stream_;
};

}  // namespace fips
