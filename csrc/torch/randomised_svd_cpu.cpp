// Randomised SVD (Halko, Martinsson, Tropp, SIAM Review 2011, algorithms 4.4 and 5.1), batched.
#include <algorithm>
#include <numeric>
#include <utility>

#include "core/philox.h"
#include "torch/init_checks.h"

namespace fips {
namespace {

// Standard normals [batch, rows, cols]: a pure function of (seed, position).
Tensor gaussian(const Tensor& like, int64_t batch, int64_t rows, int64_t cols, uint64_t seed) {
  Tensor sketch = make_empty(like, {batch, rows, cols});
  const bool is_double = sketch.scalar_type() == ScalarType::Double;
  void* out = sketch.mutable_data_ptr();
  const int64_t count = sketch.numel();
  auto write = [&](int64_t i, double sample) {
    if (i < count) {
      is_double ? static_cast<double*>(out)[i] = sample
                : static_cast<float*>(out)[i] = static_cast<float>(sample);
    }
  };
  parallel_for(kTorchThreads, ceil_div(count, 2), 2048, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const NormalPair normals = philox_normals(seed, static_cast<uint64_t>(pair));
      write(2 * pair, normals.first);
      write(2 * pair + 1, normals.second);
    }
  });
  return sketch;
}

Tensor orthonormal(const Tensor& y) {
  return call_aten<2>("aten::linalg_qr", "", y, std::string("reduced"))[0];
}

// P L of the pivoted LU factorisation of each y [batch, m, n], m >= n: a basis of its range, far
// from orthonormal but well conditioned, and much cheaper than a QR factorisation.
template <class T>
void write_permuted_lower(const T* lu, const int32_t* pivots, int64_t m, int64_t n, T* out) {
  std::vector<int64_t> row(static_cast<size_t>(m));
  std::iota(row.begin(), row.end(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t pivot = min_of(max_of(pivots[i], 1), m);  // NaNs leave LAPACK's undefined
    std::swap(row[i], row[pivot - 1]);
  }
  for (int64_t i = 0; i < m; ++i) {
    T* to = out + row[i] * n;
    const int64_t below = min_of(i, n);
    std::copy_n(lu + i * n, below, to);
    std::fill(to + below, to + n, T(0));
    if (i < n) {
      to[i] = T(1);
    }
  }
}

Tensor range_basis(const Tensor& y) {
  const int64_t batch = y.size(0), m = y.size(1), n = y.size(2);
  // A zero pivot (rank deficiency) is no error here: L stays what it is.
  const auto [factors, pivots, info] =
      call_aten<3>("aten::linalg_lu_factor_ex", "", y, true, false);
  const Tensor lu = contiguous_of(factors), swaps = contiguous_of(pivots);
  const Tensor basis = make_empty(y, {batch, m, n});
  parallel_for(kTorchThreads, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* pivot = static_cast<const int32_t*>(swaps.const_data_ptr()) + b * n;
      auto write = [&](auto element) {
        using T = decltype(element);
        write_permuted_lower(static_cast<const T*>(lu.const_data_ptr()) + b * m * n, pivot, m, n,
                             static_cast<T*>(basis.mutable_data_ptr()) + b * m * n);
      };
      y.scalar_type() == ScalarType::Double ? write(double{}) : write(float{});
    }
  });
  return basis;
}

std::tuple<Tensor, Tensor, Tensor> batched_rsvd(const Tensor& w, int64_t rank, int64_t oversample,
                                                int64_t power_iters, int64_t seed) {
  check_rsvd(w, rank, oversample, power_iters);
  const int64_t batch = w.size(0), m = w.size(1), n = w.size(2), full = min_of(m, n);
  const bool is_double = dtype_of(w, "w") == DType::kFloat64;
  const Tensor a =
      contiguous_of(torch::stable::to(w, is_double ? ScalarType::Double : ScalarType::Float));
  const Tensor at = transposed(a);
  const int64_t samples = rank + min_of(full - rank, oversample);

  Tensor q = orthonormal(
      torch::stable::matmul(a, gaussian(a, batch, n, samples, static_cast<uint64_t>(seed))));
  for (int64_t i = 0; i < power_iters; ++i) {
    // A well-conditioned basis on both sides keeps singular values below sqrt(eps) of the largest
    // alive.
    q = orthonormal(torch::stable::matmul(a, range_basis(torch::stable::matmul(at, q))));
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
