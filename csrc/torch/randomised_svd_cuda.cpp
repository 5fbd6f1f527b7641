// Randomised SVD (Halko, Martinsson, Tropp, SIAM Review 2011, algorithms 4.4 and 5.1), batched,
// from matrix products, Cholesky factors and one small decomposition; up to 512 samples nothing
// waits for the GPU.
#include "kernels/cuda/diagonal.h"
#include "kernels/cuda/gaussian.h"
#include "kernels/cuda/power_shift.h"
#include "torch/cuda_scope.h"
#include "torch/init_checks.h"
#include "torch/jacobi_cuda.h"
#include "torch/orthonormal_cuda.h"

namespace fips {
namespace {

Tensor gaussian(const Tensor& like, const std::vector<int64_t>& sizes, uint64_t seed,
                const CudaScope& scope) {
  const Tensor sketch = make_empty(like, sizes);
  cuda::gaussian(sketch.mutable_data_ptr(), sketch.numel(), dtype_of(sketch, "sketch"), seed,
                 scope.stream());
  return sketch;
}

// left^T diag(values) right of a square r, vectors as rows.
SmallSvd square_svd(const Tensor& r, const CudaScope& scope) {
  if (r.size(1) <= cuda::kJacobiMaxVectors) {
    return small_svd(r, true, scope.stream());
  }
  const auto [u, s, vh] =
      call_aten<3>("aten::linalg_svd", "", r, false, std::optional<std::string>());
  return {transposed(u), s, vh};
}

// The first `count` rows of each matrix, as columns.
Tensor leading(const Tensor& rows, int64_t count) {
  Tensor all = rows;
  return transposed(torch::stable::narrow(all, 1, 0, count));
}

Tensor sum_of_squares(const Tensor& t) {
  const std::vector<int64_t> matrix{1, 2};
  return torch::stable::sum(call_aten("aten::mul", "Tensor", t, t)[0], matrix);
}

// X with factor * X = I.
Tensor inverse_of_lower(const Tensor& factor, const CudaScope& scope) {
  constexpr bool kUpper = false, kLeft = true, kUnitriangular = false;
  const int64_t width = factor.size(1);
  const Tensor identity = make_zeros(factor, {1, width, width});
  cuda::add_to_diagonal(identity.mutable_data_ptr(), 1, width, DType::kFloat64, 0.0, 1.0, nullptr,
                        scope.stream());
  return call_aten("aten::linalg_solve_triangular", "", factor, identity, kUpper, kLeft,
                   kUnitriangular)[0];
}

// About the smallest eigenvalue of each g [batch, n, n], from the inverse of its Cholesky factor:
// tr(g^-1) / |g^-1|^2, the mean of the eigenvalues weighted by their squared reciprocals.
Tensor smallest_eigenvalue(const Tensor& inverse_factor) {
  const Tensor inverse = torch::stable::matmul(transposed(inverse_factor), inverse_factor);
  return contiguous_of(
      call_aten("aten::div", "Tensor", sum_of_squares(inverse_factor), sum_of_squares(inverse))[0]);
}

// One power iteration, y -> a a^T q - shift * q for a basis q of y, up to a change of basis of the
// columns. A shift of up to half the smallest wanted eigenvalue of a a^T keeps wanted directions in
// front of unwanted ones and widens the gap between them (dynamic shifts as in Feng, Yu, Xie, Tang,
// ACM TOMS 2024, who take the eigenvalue that the basis sees from a decomposition; here it is
// estimated).
//
// With z = a^T q = scale * p L^T, the columns of a p - shift / scale * q L^-T span the same, and no
// small singular value is squared away.
Tensor power_iteration(const Tensor& a, const Tensor& y, Orthonormaliser& basis,
                       const CudaScope& scope) {
  const Tensor q = basis.rough(y).q;
  const RoughBasis p =
      basis.rough(torch::stable::matmul(transposed(a), torch::stable::to(q, a.scalar_type())));
  const Tensor next = expect_contiguous(
      torch::stable::matmul(a, torch::stable::to(p.q, a.scalar_type())), a.scalar_type());
  const Tensor inverse = inverse_of_lower(p.factor, scope);
  const Tensor own = contiguous_of(torch::stable::matmul(q, transposed(inverse)));
  const Tensor eigenvalue = smallest_eigenvalue(inverse);
  cuda::PowerShiftParams params;
  params.batch = next.size(0);
  params.rows = next.size(1);
  params.width = next.size(2);
  params.dtype = dtype_of(next, "y");
  params.y = next.mutable_data_ptr();
  params.basis = static_cast<const double*>(own.const_data_ptr());
  params.eigenvalue = static_cast<const double*>(eigenvalue.const_data_ptr());
  params.scale = p.scale.const_data_ptr();
  cuda::subtract_power_shift(params, scope.stream());
  return next;
}

std::tuple<Tensor, Tensor, Tensor> batched_rsvd_cuda(const Tensor& w, int64_t rank,
                                                     int64_t oversample, int64_t power_iters,
                                                     int64_t seed) {
  const CudaScope scope(w);
  check_rsvd(w, rank, oversample, power_iters);
  const int64_t batch = w.size(0), m = w.size(1), n = w.size(2), full = min_of(m, n);
  const ScalarType type = accumulator_type(dtype_of(w, "w"));
  if (batch == 0) {
    return {make_empty(w, {0, m, rank}, type), make_empty(w, {0, rank}, type),
            make_empty(w, {0, rank, n}, type)};
  }
  const Tensor a = contiguous_of(torch::stable::to(w, type));
  const int64_t samples = rank + min_of(full - rank, oversample);

  Orthonormaliser basis(static_cast<uint64_t>(seed), scope.stream());
  Tensor y = torch::stable::matmul(
      a, gaussian(a, {batch, n, samples}, static_cast<uint64_t>(seed), scope));
  for (int64_t i = 0; i < power_iters; ++i) {
    y = power_iteration(a, y, basis, scope);
  }
  // a ~ a v v^T = u r v^T: both sides are projected, one product more than q q^T a takes and half
  // an iteration closer. No Gram matrix of the small factor, which would square its condition.
  const Tensor q = torch::stable::to(basis.rough(y).q, type);
  const Tensor v = torch::stable::to(basis.exact(torch::stable::matmul(transposed(a), q)), type);
  const Tensor av = torch::stable::matmul(a, v);
  const Tensor u = torch::stable::to(basis.exact(av), type);
  const SmallSvd svd = square_svd(contiguous_of(torch::stable::matmul(transposed(u), av)), scope);
  const Tensor left = torch::stable::matmul(u, leading(*svd.left, rank));
  const Tensor right = torch::stable::matmul(v, leading(svd.right, rank));
  return {contiguous_of(left), contiguous_of(columns(svd.values, 0, rank)),
          contiguous_of(transposed(right))};
}

}  // namespace
}  // namespace fips

FIPS_CUDA_LIBRARY(m) { m.impl("batched_rsvd", TORCH_BOX(&fips::batched_rsvd_cuda)); }
