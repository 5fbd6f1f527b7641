#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/shared_mlp_fused.h"
#include "kernels/cuda/shared_mlp_fused_kernel.cuh"

namespace fips::cuda {
namespace {

constexpr const char* kOp = "shared_mlp";

bool is_plain_slice(const BlockSparseView& v, const SharedMlpParams& p) {
  return !v.is_bitmap() && v.bn == p.up.bn && is_aligned(v.values, 8);
}

bool is_aligned_to_four(const void* pointer, int64_t stride) {
  return is_aligned(pointer, 8) && stride % 4 == 0;
}

template <class T, int kTokens, bool kGated>
void run(const FusedTask& task, Stream stream) {
  using Config = FusedConfig<T, kTokens, kGated>;
  launch<shared_mlp_fused_kernel<Config>>(
      kOp, {ceil_div(task.p.tokens, kTokens), Config::kThreads, task.plan.shared_bytes}, task,
      stream);
}

template <class T>
void run(const FusedTask& task, bool gated, Stream stream) {
  if (task.plan.token_tile == 128) {
    gated ? run<T, 128, true>(task, stream) : run<T, 128, false>(task, stream);
  } else {
    gated ? run<T, 64, true>(task, stream) : run<T, 64, false>(task, stream);
  }
}

}  // namespace

bool fuses_shared_mlp(const SharedMlpParams& p, const DeviceInfo& device) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const bool sizes = p.width % 16 == 0 && p.rank % 16 == 0 && p.rank_out % 16 == 0 && p.rank > 0 &&
                     p.rank_out > 0 && p.hidden() > 0 && p.hidden() < (1 << 24);
  const bool slices = is_plain_slice(p.up, p) && is_plain_slice(p.down, p) &&
                      (p.gate == nullptr || is_plain_slice(*p.gate, p));
  const bool aligned =
      is_aligned(p.x, 16) && p.x_stride % 8 == 0 && is_aligned_to_four(p.base, p.rank) &&
      is_aligned_to_four(p.base_out, p.rank_out) && is_aligned_to_four(p.y, p.y_stride);
  return half && !p.identity && sizes && slices && aligned && plan_fused(p, device).has_value();
}

bool prefers_fused_mlp(const SharedMlpParams& p, const DeviceInfo& device) {
  return p.tokens * 2 > kFusedUnitTokens * device.sm_count;
}

void shared_mlp_fused(const SharedMlpParams& params, Stream stream) {
  const DeviceInfo device = current_device();
  FIPS_CHECK(fuses_shared_mlp(params, device), kOp,
             ": these arguments have no fused kernel on this device; ask fuses_shared_mlp first");
  FusedTask task{params, params.gate == nullptr ? BlockSparseView{} : *params.gate,
                 *plan_fused(params, device)};
  const bool gated = params.gate != nullptr;
  params.dtype == DType::kBFloat16 ? run<BFloat16>(task, gated, stream)
                                   : run<Half>(task, gated, stream);
}

}  // namespace fips::cuda
