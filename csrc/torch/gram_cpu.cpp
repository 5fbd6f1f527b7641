#include "kernels/reduce.h"
#include "torch/tensor_utils.h"

namespace fips {
namespace {

constexpr int64_t kChunkTokens = 8192;  // bounds the copy of x in the Gram matrix's type

void gram_update(Tensor gram, const Tensor& x) {
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
  const Tensor tokens = flatten_tokens(x);
  const DType dtype = type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  for (int64_t first = 0; first < tokens.size(0); first += kChunkTokens) {
    Tensor all = tokens;
    const Tensor rows = torch::stable::to(
        torch::stable::narrow(all, 0, first, min_of(kChunkTokens, tokens.size(0) - first)), type);
    const Tensor moment = expect_contiguous(torch::stable::matmul(transposed(rows), rows), type);
    cpu::add_into(gram.mutable_data_ptr(), moment.const_data_ptr(), dtype, moment.numel(),
                  kTorchThreads);
  }
}

template <class T>
void add_damping(T* gram, int64_t batch, int64_t width, double damping) {
  for (int64_t b = 0; b < batch; ++b) {
    T* matrix = gram + b * width * width;
    double trace = 0;
    for (int64_t i = 0; i < width; ++i) {
      trace += matrix[i * width + i];
    }
    for (int64_t i = 0; i < width; ++i) {
      matrix[i * width + i] += static_cast<T>(damping * trace / static_cast<double>(width));
    }
  }
}

std::tuple<Tensor, Tensor> batched_gram_eigh(const Tensor& w, double damping) {
  FIPS_CHECK(w.dim() == 3, "w: expected [batch, m, n], got ", shape_of(w));
  FIPS_CHECK(damping >= 0, "damping: got ", damping, "; expected a number of at least 0");
  const bool is_double = dtype_of(w, "w") == DType::kFloat64;
  const Tensor wide = torch::stable::to(w, is_double ? ScalarType::Double : ScalarType::Float);
  const Tensor gram =
      expect_contiguous(torch::stable::matmul(wide, transposed(wide)), wide.scalar_type());
  if (damping > 0 && gram.numel() > 0) {
    is_double
        ? add_damping(static_cast<double*>(gram.mutable_data_ptr()), w.size(0), w.size(1), damping)
        : add_damping(static_cast<float*>(gram.mutable_data_ptr()), w.size(0), w.size(1), damping);
  }
  const auto [values, vectors] = call_aten<2>("aten::linalg_eigh", "", gram, std::string("L"));
  const std::vector<int64_t> last{-1};  // ascending to descending
  return {call_aten("aten::flip", "", values, last)[0],
          contiguous_of(call_aten("aten::flip", "", vectors, last)[0])};
}

}  // namespace
}  // namespace fips

STABLE_TORCH_LIBRARY_IMPL(fips, CPU, m) {
  m.impl("gram_update", TORCH_BOX(&fips::gram_update));
  m.impl("batched_gram_eigh", TORCH_BOX(&fips::batched_gram_eigh));
}
