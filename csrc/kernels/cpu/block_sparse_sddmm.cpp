#include "kernels/block_sparse_sddmm.h"

#include "kernels/cpu/dispatch.h"

namespace fips::cpu {

void block_sparse_sddmm(const BlockSparseSddmmParams& p, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  parallel_for(parallel, p.v.num_blocks, 1,
               [&](int64_t begin, int64_t end) { kernels.sddmm(p, begin, end); });
}

}  // namespace fips::cpu
