#include "kernels/cuda/block_sparse_mm.h"
#include "kernels/cuda/block_sparse_mm_heuristics.h"
#include "kernels/cuda/block_sparse_mm_launch.h"
#include "kernels/cuda/cuda_check.cuh"

namespace fips::cuda {
namespace {

int multiprocessor_count() {
  int device = 0, count = 0;
  FIPS_CUDA_CHECK(cudaGetDevice(&device));
  FIPS_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

void check_block_edges(const BlockSparseView& v) {
  FIPS_CHECK(is_allowed_block_edge(v.bk) && is_allowed_block_edge(v.bn),
             "block_sparse_mm: block is ", v.bk, "x", v.bn,
             "; each edge must be 16, 32, 64 or 128");
}

}  // namespace

void block_sparse_mm(const BlockSparseMmParams& params, cudaStream_t stream) {
  check_block_edges(params.v);
  const MmTask task = make_task(params);
  if (task.tokens == 0 || task.out_features == 0) {
    return;
  }
  const DType dtype = params.v.dtype;
  const bool bitmap = params.v.is_bitmap();
  const int token_tile =
      choose_token_tile({task.tokens, task.out_blocks, dtype, bitmap, multiprocessor_count()});
  const int out_edge = params.transpose ? params.v.bk : params.v.bn;
  const MmChoice choice{params.transpose, bitmap, out_edge, token_tile};
  const MmLaunch launch{task, stream};
  switch (dtype) {
    case DType::kBFloat16:
      return launch_mm_bfloat16(choice, launch);
    case DType::kFloat16:
      return launch_mm_float16(choice, launch);
    case DType::kFloat32:
      return launch_mm_float32(choice, launch);
    default:
      fail("block_sparse_mm: ", dtype_name(dtype),
           " has no CUDA kernel; use float32, bfloat16 or float16, or run it on the CPU");
  }
}

}  // namespace fips::cuda
