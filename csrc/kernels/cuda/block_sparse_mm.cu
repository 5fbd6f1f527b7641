#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_mm_heuristics.h"
#include "kernels/cuda/block_sparse_mm_launch.h"
#include "kernels/cuda/block_sparse_mm_resident.h"
#include "kernels/cuda/device_info.h"

#if defined(FIPS_CUDA_SM90)  // built for sm_90a as well
#include "kernels/cuda/block_sparse_mm_sm90.h"
#endif

namespace fips::cuda {
namespace {

void run(const BlockSparseMmParams& params, const MmTask& task, Stream stream) {
  const DType dtype = params.v.dtype;
  const bool bitmap = params.v.is_bitmap();
  const int token_tile =
      choose_token_tile({task.tokens, task.out_blocks, dtype, bitmap, current_device().sm_count});
  const int out_edge = params.transpose ? params.v.bk : params.v.bn;
  const bool tf32 = dtype == DType::kFloat32 && params.allow_tf32;
  const MmChoice choice{params.transpose, bitmap, out_edge, token_tile, tf32};
  switch (dtype) {
    case DType::kBFloat16:
      return launch_mm<BFloat16>(choice, task, stream);
    case DType::kFloat16:
      return launch_mm<Half>(choice, task, stream);
    case DType::kFloat32:
      return launch_mm<float>(choice, task, stream);
    default:
      fail("block_sparse_mm: ", dtype_name(dtype),
           " has no CUDA kernel; use float32, bfloat16 or float16, or run it on the CPU");
  }
}

}  // namespace

void block_sparse_mm(const BlockSparseMmParams& params, const MmEpilogue& epilogue, Stream stream) {
  check_sizes(params.v, "block_sparse_mm");
  MmTask task = make_task(params);
  if (task.tokens == 0 || task.out_features == 0) {
    return;
  }
  const DeviceInfo device = current_device();
#if defined(FIPS_CUDA_SM90)
  if (device.capability == 90 && sm90_supports(params, epilogue, device)) {
    return block_sparse_mm_sm90(params, epilogue, sm90_plan(params, epilogue, device), stream);
  }
#endif
  if (prefers_resident(params) && resident_supports(params, epilogue, device)) {
    return block_sparse_mm_resident(params, epilogue, stream);
  }
  task.activation = epilogue.activation;
  if (epilogue.gate != nullptr) {
    BlockSparseMmParams gate = params;
    gate.v = *epilogue.gate;
    gate.bias = epilogue.gate_bias;
    run(gate, make_task(gate), stream);
    task.gate = params.out;  // each thread reads its own elements before it overwrites them
  }
  run(params, task, stream);
}

}  // namespace fips::cuda
