#include "kernels/cuda/block_sparse_mm_resident.h"
#include "kernels/cuda/block_sparse_mm_resident_kernel.cuh"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr const char* kOp = "block_sparse_mm";

template <class T, int kTokens, bool kGated>
void run(const ResidentTask& task, Stream stream) {
  using Config = ResidentConfig<T, kTokens, kGated>;
  const int64_t tiles = ceil_div(task.p.tokens, kTokens);
  launch<block_sparse_mm_resident_kernel<Config>>(
      kOp, {tiles * task.plan.splits, Config::kThreads, kTokens * task.plan.stride}, task, stream);
}

template <class T>
void run(const ResidentTask& task, bool gated, Stream stream) {
  if (task.plan.token_tile == 128) {
    gated ? run<T, 128, true>(task, stream) : run<T, 128, false>(task, stream);
  } else {
    gated ? run<T, 64, true>(task, stream) : run<T, 64, false>(task, stream);
  }
}

bool takes_slice(const BlockSparseView& v) { return !v.is_bitmap() && is_aligned(v.values, 8); }

}  // namespace

bool resident_supports(const BlockSparseMmParams& p, const MmEpilogue& epilogue,
                       const DeviceInfo& device) {
  const bool half = p.v.dtype == DType::kBFloat16 || p.v.dtype == DType::kFloat16;
  const bool slices = takes_slice(p.v) && (epilogue.gate == nullptr || takes_slice(*epilogue.gate));
  const bool aligned = is_aligned(p.x, 16) && p.x_stride % 8 == 0 && p.v.rows % 8 == 0 &&
                       is_aligned(p.out, 8) && p.out_stride % 4 == 0;
  return half && !p.transpose && slices && aligned && p.v.cols < (1 << 28) &&
         plan_resident(resident_query(p, epilogue, device)).has_value();
}

bool prefers_resident(const BlockSparseMmParams& p) {
  return p.tokens >= 64 && (p.v.bk < 64 || p.v.bn < 64);
}

void block_sparse_mm_resident(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                              Stream stream) {
  const DeviceInfo device = current_device();
  FIPS_CHECK(
      resident_supports(params, epilogue, device), kOp,
      ": these arguments have no resident kernel on this device; ask resident_supports first");
  const bool gated = epilogue.gate != nullptr;
  const ResidentTask task{params, gated ? *epilogue.gate : BlockSparseView{}, epilogue.gate_bias,
                          epilogue.activation,
                          *plan_resident(resident_query(params, epilogue, device))};
  params.v.dtype == DType::kBFloat16 ? run<BFloat16>(task, gated, stream)
                                     : run<Half>(task, gated, stream);
}

}  // namespace fips::cuda
