#include "kernels/cuda/diagonal.h"
#include "kernels/cuda/reduce.h"
#include "torch/cuda_scope.h"
#include "torch/init_checks.h"
#include "torch/jacobi_cuda.h"

namespace fips {
namespace {

// Halves are multiplied in the Gram matrix's type: every product of theirs is exact there.
void gram_update_cuda(Tensor gram, const Tensor& x) {
  const CudaScope scope(x);
  const ScalarType type = gram.scalar_type();
  check_gram_update(gram, x);
  Tensor tokens = token_rows(x);
  for (int64_t first = 0; first < tokens.size(0); first += kGramChunkTokens) {
    const int64_t count = min_of(kGramChunkTokens, tokens.size(0) - first);
    const Tensor rows = torch::stable::to(torch::stable::narrow(tokens, 0, first, count), type);
    const Tensor moment = expect_contiguous(torch::stable::matmul(transposed(rows), rows), type);
    if (type == ScalarType::Double) {
      cuda::add_into(static_cast<double*>(gram.mutable_data_ptr()),
                     static_cast<const double*>(moment.const_data_ptr()), moment.numel(),
                     scope.stream());
    } else {
      cuda::add_into(static_cast<float*>(gram.mutable_data_ptr()), moment.const_data_ptr(),
                     DType::kFloat32, moment.numel(), scope.stream());
    }
  }
}

// w w^T + damping * mean(diag) * I in `type`.
Tensor damped_gram(const Tensor& w, ScalarType type, double damping, const CudaScope& scope) {
  const Tensor wide = torch::stable::to(w, type);
  const Tensor gram = expect_contiguous(torch::stable::matmul(wide, transposed(wide)), type);
  cuda::add_to_diagonal(gram.mutable_data_ptr(), w.size(0), w.size(1), dtype_of(gram, "gram"),
                        damping, 0.0, nullptr, scope.stream());
  return gram;
}

// The right singular vectors of L^T are the eigenvectors of the Gram matrix L L^T, its squared
// singular values the eigenvalues (Veselic, Hari, Numer. Math. 1989): fewer sweeps than on the Gram
// matrix itself, and on half the data, since only one side of the vectors is wanted. Product and
// factor are float64, which costs little beside the sweeps and leaves no eigenvalue to rounding;
// the lift that keeps a singular matrix's factor finite is taken off again.
std::tuple<Tensor, Tensor> small_gram_eigh(const Tensor& w, ScalarType type, double damping,
                                           const CudaScope& scope) {
  const int64_t batch = w.size(0), width = w.size(1);
  const Tensor gram = damped_gram(w, ScalarType::Double, damping, scope);
  const Tensor lift = make_empty(gram, {batch, 1});
  cuda::add_to_diagonal(gram.mutable_data_ptr(), batch, width, DType::kFloat64,
                        kCholeskyLift * static_cast<double>(width), kSmallestLift,
                        static_cast<double*>(lift.mutable_data_ptr()), scope.stream());
  const Tensor factor = cholesky(gram);
  const SmallSvd svd =
      small_svd(contiguous_of(torch::stable::to(transposed(factor), type)), false, scope.stream());
  const Tensor roots = torch::stable::to(svd.values, ScalarType::Double);
  const Tensor values =
      torch::stable::subtract(call_aten("aten::mul", "Tensor", roots, roots)[0], lift);
  return {torch::stable::to(values, type), contiguous_of(transposed(svd.right))};
}

std::tuple<Tensor, Tensor> batched_gram_eigh_cuda(const Tensor& w, double damping) {
  const CudaScope scope(w);
  check_gram_eigh(w, damping);
  const ScalarType type = accumulator_type(dtype_of(w, "w"));
  const int64_t batch = w.size(0), width = w.size(1);
  if (batch == 0 || width == 0) {
    return {make_empty(w, {batch, width}, type), make_empty(w, {batch, width, width}, type)};
  }
  if (width <= cuda::kJacobiMaxVectors) {
    return small_gram_eigh(w, type, damping, scope);
  }
  const auto [values, vectors] =
      call_aten<2>("aten::linalg_eigh", "", damped_gram(w, type, damping, scope), std::string("L"));
  const std::vector<int64_t> last{-1};  // ascending to descending
  return {call_aten("aten::flip", "", values, last)[0],
          contiguous_of(call_aten("aten::flip", "", vectors, last)[0])};
}

}  // namespace
}  // namespace fips

FIPS_CUDA_LIBRARY(m) {
  m.impl("gram_update", TORCH_BOX(&fips::gram_update_cuda));
  m.impl("batched_gram_eigh", TORCH_BOX(&fips::batched_gram_eigh_cuda));
}
