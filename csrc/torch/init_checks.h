// What the ops of initialisation ask of their arguments, on any device.
#pragma once

#include "torch/tensor_utils.h"

namespace fips {

// gram_update: gram [d, d] float32 or float64, x [..., d] of any floating type.
inline void check_gram_update(const Tensor& gram, const Tensor& x) {
  const ScalarType type = gram.scalar_type();
  FIPS_CHECK(type == ScalarType::Float || type == ScalarType::Double, "gram: dtype is ",
             torch::headeronly::toString(type),
             "; second moments are summed in float32 or float64");
  const int64_t width = last_dim(x, "x");
  dtype_of(x, "x");
  FIPS_CHECK(gram.dim() == 2 && gram.size(0) == width && gram.size(1) == width,
             "gram: expected shape [", width, ", ", width, "] to match x, got ", shape_of(gram));
  FIPS_CHECK(gram.is_contiguous(), "gram: must be contiguous, it is updated in place");
  check_same_device(gram, x, "gram");
}

// batched_gram_eigh: w [batch, m, n].
inline void check_gram_eigh(const Tensor& w, double damping) {
  FIPS_CHECK(w.dim() == 3, "w: expected [batch, m, n], got ", shape_of(w));
  FIPS_CHECK(damping >= 0, "damping: got ", damping, "; expected a number of at least 0");
}

// batched_rsvd: w [batch, m, n].
inline void check_rsvd(const Tensor& w, int64_t rank, int64_t oversample, int64_t power_iters) {
  FIPS_CHECK(w.dim() == 3, "w: expected [batch, m, n], got ", shape_of(w));
  const int64_t m = w.size(1), n = w.size(2), full = min_of(m, n);
  FIPS_CHECK(rank >= 1 && rank <= full, "rank: got ", rank, "; it must lie in [1, ", full,
             "] for matrices of ", m, " x ", n);
  FIPS_CHECK(oversample >= 0, "oversample: got ", oversample, "; expected at least 0");
  FIPS_CHECK(power_iters >= 0, "power_iters: got ", power_iters, "; expected at least 0");
}

// Tokens whose copy in the Gram matrix's type gram_update makes at once.
inline constexpr int64_t kGramChunkTokens = 8192;

}  // namespace fips
