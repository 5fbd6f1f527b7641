#include "kernels/skinny_mm.h"

#include "kernels/cpu/dispatch.h"

namespace fips::cpu {
namespace {

// Columns that one task takes at least: whole cache lines, read in runs of several. Rows: those of
// a tile register.
constexpr int64_t kColumnStep = 64, kRowStep = 16;

}  // namespace

int64_t skinny_mm_workspace(const SkinnyMmParams& p) {
  return p.tokens * p.in_features() * (p.dtype == DType::kFloat64 ? 8 : 4);
}

void skinny_mm(const SkinnyMmParams& p, void* workspace, const Parallel& parallel) {
  const KernelTable& kernels = kernel_table();
  kernels.skinny_pack(p, workspace);
  const int64_t outputs = p.transpose ? p.rows : p.cols;
  const int64_t step = p.transpose ? kRowStep : kColumnStep;
  parallel_for(parallel, ceil_div(outputs, step), 1, [&](int64_t begin, int64_t end) {
    kernels.skinny_mm(p, workspace, begin * step, min_of(outputs, end * step));
  });
}

}  // namespace fips::cpu
