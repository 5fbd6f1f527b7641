#include "kernels/dense_fill.h"

#include "kernels/cpu/dispatch.h"

namespace fips::cpu {

void fill_dense_transposed(const BlockSparseView& v, void* out, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  parallel_for(parallel, v.block_cols(), 1,
               [&](int64_t begin, int64_t end) { kernels.fill(v, out, begin, end); });
}

void gather_stored(const GatherParams& p, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  parallel_for(parallel, p.v.block_cols(), 1,
               [&](int64_t begin, int64_t end) { kernels.gather(p, begin, end); });
}

}  // namespace fips::cpu
