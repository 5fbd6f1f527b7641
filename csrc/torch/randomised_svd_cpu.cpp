// Randomised SVD (Halko, Martinsson, Tropp, SIAM Review 2011, algorithms 4.4 and 5.1), batched.
#include "core/philox.h"
#include "torch/tensor_utils.h"

namespace fips {
namespace {

// Standard normals [batch, rows, cols]: a pure function of (seed, position).
Tensor gaussian(const Tensor& like, int64_t batch, int64_t rows, int64_t cols, uint64_t seed) {
  Tensor sketch = make_empty(like, {batch, rows, cols});
  const bool is_double = sketch.scalar_type() == ScalarType::Double;
  void* out = sketch.mutable_data_ptr();
  parallel_for(kTorchThreads, sketch.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double sample = philox_normal(seed, static_cast<uint64_t>(i));
      if (is_double) {
        static_cast<double*>(out)[i] = sample;
      } else {
        static_cast<float*>(out)[i] = static_cast<float>(sample);
      }
    }
  });
  return sketch;
}

Tensor orthonormal(const Tensor& y) {
  return call_aten<2>("aten::linalg_qr", "", y, std::string("reduced"))[0];
}

std::tuple<Tensor, Tensor, Tensor> batched_rsvd(const Tensor& w, int64_t rank, int64_t oversample,
                                                int64_t power_iters, int64_t seed) {
  FIPS_CHECK(w.dim() == 3, "w: expected [batch, m, n], got ", shape_of(w));
  const int64_t batch = w.size(0), m = w.size(1), n = w.size(2), full = min_of(m, n);
  FIPS_CHECK(rank >= 1 && rank <= full, "rank: got ", rank, "; it must lie in [1, ", full,
             "] for matrices of ", m, " x ", n);
  FIPS_CHECK(oversample >= 0, "oversample: got ", oversample, "; expected at least 0");
  FIPS_CHECK(power_iters >= 0, "power_iters: got ", power_iters, "; expected at least 0");
  const bool is_double = dtype_of(w, "w") == DType::kFloat64;
  const Tensor a =
      contiguous_of(torch::stable::to(w, is_double ? ScalarType::Double : ScalarType::Float));
  const Tensor at = transposed(a);
  const int64_t samples = rank + min_of(full - rank, oversample);

  Tensor q = orthonormal(
      torch::stable::matmul(a, gaussian(a, batch, n, samples, static_cast<uint64_t>(seed))));
  for (int64_t i = 0; i < power_iters; ++i) {
    // Orthonormalising on both sides keeps singular values below sqrt(eps) of the largest alive.
    q = orthonormal(torch::stable::matmul(a, orthonormal(torch::stable::matmul(at, q))));
  }
  // a ~ q (q^T a); the small factor is decomposed through the QR of its transpose, so that no Gram
  // matrix squares the condition number.
  const auto [q_right, r_right] =
      call_aten<2>("aten::linalg_qr", "", torch::stable::matmul(at, q), std::string("reduced"));
  const auto [u, s, vh] = call_aten<3>("aten::linalg_svd", "", contiguous_of(transposed(r_right)),
                                       false, std::optional<std::string>());
  const Tensor left = torch::stable::matmul(q, u);
  const Tensor right = torch::stable::matmul(vh, transposed(q_right));
  Tensor rows = right;
  return {contiguous_of(columns(left, 0, rank)), contiguous_of(columns(s, 0, rank)),
          contiguous_of(torch::stable::narrow(rows, 1, 0, rank))};
}

}  // namespace
}  // namespace fips

STABLE_TORCH_LIBRARY_IMPL(fips, CPU, m) { m.impl("batched_rsvd", TORCH_BOX(&fips::batched_rsvd)); }
