#include "kernels/activation.h"

#include "kernels/cpu/dispatch.h"

namespace fips::cpu {
namespace {
constexpr int64_t kGrain = 16384;  // elements; below this a second thread costs more than it brings
}

void activation_forward(const ActivationParams& p, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  parallel_for(parallel, p.count, kGrain,
               [&](int64_t begin, int64_t end) { kernels.activation_forward(p, begin, end); });
}

void activation_backward(const ActivationParams& p, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  parallel_for(parallel, p.count, kGrain,
               [&](int64_t begin, int64_t end) { kernels.activation_backward(p, begin, end); });
}

}  // namespace fips::cpu
