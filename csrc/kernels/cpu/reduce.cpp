#include "kernels/reduce.h"

#include <vector>

#include "core/math.h"
#include "kernels/cpu/element_type.h"

namespace fips::cpu {
namespace {

constexpr int64_t kGrain = 32768;

}  // namespace

void add_into(void* sums, const void* values, DType dtype, int64_t count,
              const Parallel& parallel) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    auto* out = static_cast<Accumulator<T>*>(sums);
    const auto* in = static_cast<const T*>(values);
    parallel_for(parallel, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out[i] += to_accumulator(in[i]);
      }
    });
  });
}

void add_column_sums(void* sums, const void* matrix, DType dtype, int64_t rows, int64_t cols,
                     const Parallel& parallel) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    auto* out = static_cast<Accumulator<T>*>(sums);
    const auto* in = static_cast<const T*>(matrix);
    const int64_t grain = max_of(64, kGrain / max_of(1, rows));
    parallel_for(parallel, cols, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = begin; c < end; ++c) {
          out[c] += to_accumulator(in[row * cols + c]);
        }
      }
    });
  });
}

void scale_into(void* out, const void* sums, double scale, DType dtype, int64_t count,
                const Parallel& parallel) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto* in = static_cast<const A*>(sums);
    auto* to = static_cast<T*>(out);
    const A factor = static_cast<A>(scale);
    parallel_for(parallel, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        to[i] = FromAccumulator<T>::convert(factor * in[i]);
      }
    });
  });
}

double weighted_residual(void* y, const void* target, const float* weight, DType dtype,
                         int64_t rows, int64_t cols, const Parallel& parallel) {
  std::vector<double> partial(static_cast<size_t>(rows),
                              0.0);  // one sum a row: no thread count in it
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    auto* out = static_cast<T*>(y);
    const auto* wanted = static_cast<const T*>(target);
    parallel_for(
        parallel, rows, max_of(1, kGrain / max_of(1, cols)), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const Accumulator<T> scale = weight == nullptr ? 1.0f : weight[row];
            double sum = 0;
            for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
              const Accumulator<T> difference = to_accumulator(out[i]) - to_accumulator(wanted[i]);
              sum += static_cast<double>(difference) * difference;
              out[i] = FromAccumulator<T>::convert(scale * difference);
            }
            partial[static_cast<size_t>(row)] = scale * sum;
          }
        });
  });
  double total = 0;
  for (double sum : partial) {
    total += sum;
  }
  return total;
}

}  // namespace fips::cpu
