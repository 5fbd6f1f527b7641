#include <limits>

#include "kernels/cuda/block_sparse_mm_sm90.h"
#include "kernels/cuda/block_sparse_mm_sm90_config.h"
#include "kernels/cuda/block_sparse_mm_sm90_heuristics.h"
#include "kernels/cuda/block_sparse_mm_sm90_launch.h"
#include "kernels/cuda/block_sparse_mm_task.h"

namespace fips::cuda {
namespace {

bool has_edge(int edge) { return edge == 64 || edge == 128; }

bool has_values(const BlockSparseView& v) {
  return !v.is_bitmap() && has_edge(v.bk) && has_edge(v.bn) &&
         tensor_map_accepts(v.values, v.num_blocks * v.bn, v.bk, v.bk);
}

bool same_grid(const BlockSparseView& a, const BlockSparseView& b) {
  return a.dtype == b.dtype && a.rows == b.rows && a.cols == b.cols && a.bk == b.bk && a.bn == b.bn;
}

Sm90Query make_query(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                     const DeviceInfo& device) {
  const BlockSparseView& v = params.v;
  const bool transpose = params.transpose, gated = epilogue.gate != nullptr;
  const int64_t blocks = v.num_blocks + (gated ? epilogue.gate->num_blocks : 0);
  return {params.tokens,
          round_up(params.in_features(), transpose ? v.bn : v.bk),
          transpose ? v.block_rows() : v.block_cols(),
          blocks * (transpose ? v.bn : v.bk) / kSm90Reduce,
          transpose ? v.bk : v.bn,
          transpose,
          gated,
          device.sm_count};
}

// `box_rows`: rows of weights that one copy brings.
Sm90Product make_product(const BlockSparseView& v, bool transpose, int box_rows, const void* bias) {
  return {
      make_tensor_map(v.values, {v.dtype, v.num_blocks * v.bn, v.bk, v.bk, box_rows, kSm90Reduce}),
      transpose ? v.row_ptr : v.col_ptr,
      transpose ? v.col_idx : v.row_idx,
      transpose ? v.block_id : nullptr,
      bias,
      static_cast<int>(v.num_blocks)};
}

Sm90Task make_task(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const Sm90Plan& plan, const DeviceInfo& device) {
  const BlockSparseView& v = params.v;
  const bool transpose = params.transpose, gated = epilogue.gate != nullptr;
  const int64_t out_blocks = transpose ? v.block_rows() : v.block_cols();
  const int box_rows = plan.resident || transpose ? kMmaRows : v.bn;
  const int store_tokens = plan.resident ? kResidentStoreTokens : kStreamStoreTokens;
  Sm90Task task{};
  task.x = make_tensor_map(params.x, {v.dtype, params.tokens, params.in_features(), params.x_stride,
                                      plan.tokens, kSm90Reduce});
  task.out = make_tensor_map(params.out, {v.dtype, params.tokens, params.out_features(),
                                          params.out_stride, store_tokens, kMmaRows});
  const Sm90Product up = make_product(v, transpose, box_rows, params.bias);
  task.product[0] =
      gated ? make_product(*epilogue.gate, transpose, box_rows, epilogue.gate_bias) : up;
  task.product[1] = up;
  task.activation = epilogue.activation;
  task.token_tiles = static_cast<int>(ceil_div(params.tokens, plan.tokens));
  task.out_blocks = static_cast<int>(out_blocks);
  task.reduce_blocks = static_cast<int>(transpose ? v.block_cols() : v.block_rows());
  task.tiles = task.token_tiles * task.out_blocks * (plan.resident ? v.bn / kMmaRows : 1);
  task.grid = static_cast<int>(min_of(task.tiles, device.sm_count));
  task.in_features = static_cast<int>(params.in_features());
  task.out_features = static_cast<int>(params.out_features());
  task.reduce_shift = log2_of_edge(transpose ? v.bn : v.bk);
  task.n_edge = v.bn;
  return task;
}

}  // namespace

bool sm90_supports(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const DeviceInfo& device) {
  const BlockSparseView& v = params.v;
  const bool dtype = v.dtype == DType::kBFloat16 || v.dtype == DType::kFloat16;
  const int64_t tiles =
      ceil_div(params.tokens, kSm90LowTile) * (params.transpose ? v.block_rows() : v.block_cols());
  if (!dtype || device.max_shared_bytes < kSm90SharedBytes || params.tokens < kSm90MinTokens ||
      tiles > std::numeric_limits<int32_t>::max() - device.sm_count || !has_values(v) ||
      !tensor_map_accepts(params.x, params.tokens, params.in_features(), params.x_stride) ||
      !tensor_map_accepts(params.out, params.tokens, params.out_features(), params.out_stride)) {
    return false;
  }
  if (params.transpose &&
      (epilogue.gate != nullptr || epilogue.activation != Activation::kIdentity)) {
    return false;
  }
  return epilogue.gate == nullptr || (same_grid(*epilogue.gate, v) && has_values(*epilogue.gate));
}

Sm90Plan sm90_plan(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                   const DeviceInfo& device) {
  return choose_sm90_plan(make_query(params, epilogue, device));
}

void block_sparse_mm_sm90(const BlockSparseMmParams& params, const MmEpilogue& epilogue,
                          const Sm90Plan& plan, Stream stream) {
  const DeviceInfo device = current_device();
  FIPS_CHECK(sm90_plan_exists(make_query(params, epilogue, device), plan), "block_sparse_mm: no ",
             plan.resident ? "resident" : "streaming", " kernel for tiles of ", plan.tokens,
             " tokens and ", params.in_features(), " input features");
  if (epilogue.gate != nullptr) {
    check_sizes(*epilogue.gate, "block_sparse_mm: gate");
  }
  const bool transpose = params.transpose;
  const Sm90Choice choice{plan, transpose, epilogue.gate != nullptr,
                          transpose ? params.v.bk : params.v.bn};
  const Sm90Task task = make_task(params, epilogue, plan, device);
  params.v.dtype == DType::kBFloat16 ? launch_sm90<BFloat16>(choice, task, stream)
                                     : launch_sm90<Half>(choice, task, stream);
}

}  // namespace fips::cuda
