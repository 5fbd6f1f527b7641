#include "kernels/reduce.h"
#include "torch/init_checks.h"

namespace fips {
namespace {

void gram_update(Tensor gram, const Tensor& x) {
  const ScalarType type = gram.scalar_type();
  check_gram_update(gram, x);
  const Tensor tokens = flatten_tokens(x);
  const DType dtype = type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  for (int64_t first = 0; first < tokens.size(0); first += kGramChunkTokens) {
    Tensor all = tokens;
    const Tensor rows = torch::stable::to(
        torch::stable::narrow(all, 0, first, min_of(kGramChunkTokens, tokens.size(0) - first)),
        type);
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
  check_gram_eigh(w, damping);
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
