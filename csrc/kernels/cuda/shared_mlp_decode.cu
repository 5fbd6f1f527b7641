#include <atomic>
#include <random>

#include "kernels/cuda/device_info.h"
#include "kernels/cuda/shared_mlp_decode.h"
#include "kernels/cuda/shared_mlp_decode_launch.h"

namespace fips::cuda {
namespace {

constexpr const char* kOp = "shared_mlp_decode";

void check_slice(const BlockSparseView& v, const char* name, int64_t rows, int64_t hidden,
                 DType dtype) {
  check_sizes(v, name);
  FIPS_CHECK(v.rows == rows && v.cols == hidden, kOp, ": ", name, " is ", v.rows, "x", v.cols,
             "; base and hidden width ask for ", rows, "x", hidden);
  FIPS_CHECK(v.dtype == dtype, kOp, ": ", name, " has ", dtype_name(v.dtype), " values; x is ",
             dtype_name(dtype));
  FIPS_CHECK(v.num_blocks <= kMaxInFeatures, kOp, ": ", name, " stores ", v.num_blocks,
             " blocks; at most ", kMaxInFeatures, " are supported");
}

void check_params(const SharedMlpDecodeParams& p) {
  FIPS_CHECK(p.dtype != DType::kFloat64, kOp,
             ": float64 has no CUDA kernel; use float32, bfloat16 or float16");
  FIPS_CHECK(p.tokens >= 0 && p.tokens <= kDecodeTokens, kOp, ": got ", p.tokens, " tokens; 0 to ",
             kDecodeTokens, " are supported");
  FIPS_CHECK(p.width >= 0 && p.rank >= 0 && p.rank_out >= 0 && p.width <= kMaxInFeatures / 2 &&
                 p.rank <= kMaxInFeatures / 2 && p.rank_out <= kMaxInFeatures / 2 &&
                 p.hidden() <= kMaxInFeatures,
             kOp, ": width ", p.width, ", ranks ", p.rank, " and ", p.rank_out, ", hidden width ",
             p.hidden(), "; the sizes are too large for CUDA");
  const int64_t identity = p.identity ? p.width : 0;
  check_slice(p.up, "up", p.rank + identity, p.hidden(), p.dtype);
  if (p.gate != nullptr) {
    check_slice(*p.gate, "gate", p.rank + identity, p.hidden(), p.dtype);
  }
  check_slice(p.down, "down", p.rank_out + identity, p.hidden(), p.dtype);
}

DecodeMatrix dense_matrix(const void* values, int64_t rows, int64_t cols, bool transposed,
                          int64_t element) {
  DecodeMatrix m{};
  m.values = values;
  m.in_features = static_cast<int>(transposed ? rows : cols);
  m.out_features = static_cast<int>(transposed ? cols : rows);
  m.transposed = transposed;
  m.row_stride = cols;
  m.wide = is_aligned(values, kChunkBytes) && cols * element % kChunkBytes == 0;
  return m;
}

// `transposed` as in DecodeMatrix: true for h V^T, whose outputs are the contiguous rows of V.
DecodeMatrix slice_matrix(const BlockSparseView& v, bool transposed) {
  DecodeMatrix m{};
  m.values = v.values;
  m.in_features = static_cast<int>(transposed ? v.cols : v.rows);
  m.out_features = static_cast<int>(transposed ? v.rows : v.cols);
  m.transposed = transposed;
  m.wide = is_aligned(v.values, kChunkBytes);
  m.range = transposed ? v.row_ptr : v.col_ptr;
  m.reduce_index = transposed ? v.col_idx : v.row_idx;
  m.block_id = transposed ? v.block_id : nullptr;
  m.num_blocks = static_cast<int>(v.num_blocks);
  m.reduce_blocks = static_cast<int>(transposed ? v.block_cols() : v.block_rows());
  m.slots = static_cast<int>(v.slots());
  m.out_shift = log2_of_edge(transposed ? v.bk : v.bn);
  m.reduce_shift = log2_of_edge(transposed ? v.bn : v.bk);
  m.k_shift = log2_of_edge(v.bk);
  m.mask = v.mask;
  m.value_ptr = v.block_ptr;
  m.num_values = v.num_values;
  m.wide_mask = is_aligned(v.mask, 4);
  return m;
}

// One block on each multiprocessor, since every block has to run while the others do; no more than
// there are tiles.
int grid_blocks(const DecodeTask& task) {
  int64_t tiles = 1;
  for (int stage = 0; stage < kDecodeStages; ++stage) {
    tiles = max_of(tiles, tiles_of(task, stage));
  }
  return static_cast<int>(min_of(tiles, current_device().sm_count));
}

// Each call gets another one; odd, so never 0. Starts at random, so that what an earlier process
// left in memory means nothing.
uint64_t next_nonce() {
  static std::atomic<uint64_t> last{[] {
    std::random_device random;
    return uint64_t{random()} << 33 | uint64_t{random()} << 1 | 1;
  }()};
  return last.fetch_add(2, std::memory_order_relaxed);
}

}  // namespace

DecodeTask make_decode_task(const SharedMlpDecodeParams& p) {
  check_params(p);
  const int64_t element = element_size(p.dtype);
  DecodeTask task{};
  task.matrix[0] = dense_matrix(p.base, p.width, p.rank, true, element);
  task.matrix[1] = slice_matrix(p.up, false);
  if (p.gate != nullptr) {
    task.matrix[2] = slice_matrix(*p.gate, false);
  }
  task.matrix[3] = slice_matrix(p.down, true);
  task.matrix[4] = dense_matrix(p.base_out, p.width, p.rank_out, false, element);
  const int64_t counts[] = {p.width, p.up.rows, p.hidden(), p.down.rows, p.width};
  for (int i = 0; i <= kDecodeStages; ++i) {
    const int64_t stride = round_up(counts[i], kChunkBytes / element);
    task.features[i] = {nullptr, stride, static_cast<int>(counts[i]), true};
  }
  task.features[0] = {const_cast<void*>(p.x), p.x_stride, static_cast<int>(p.width),
                      is_aligned(p.x, kChunkBytes) && p.x_stride * element % kChunkBytes == 0};
  task.features[kDecodeStages] = {p.y, p.y_stride, static_cast<int>(p.width), false};
  // The last product sums over the base's part of w only.
  task.features[kDecodeStages - 1].count = static_cast<int>(p.rank_out);
  task.up_bias = p.up_bias;
  task.gate_bias = p.gate_bias;
  task.down_bias = p.down_bias;
  task.activation = p.activation;
  task.tokens = static_cast<int>(p.tokens);
  task.width = static_cast<int>(p.width);
  task.rank = static_cast<int>(p.rank);
  task.rank_out = static_cast<int>(p.rank_out);
  task.gated = p.gate != nullptr;
  task.identity = p.identity;
  return task;
}

DecodeWorkspace plan_workspace(const DecodeTask& task, int blocks, int64_t element_bytes) {
  DecodeWorkspace plan{};
  plan.bytes = round_up(int64_t{kDecodeBarriers} * blocks * 8, 128);
  for (int i = 1; i < kDecodeStages; ++i) {
    plan.features_at[i] = plan.bytes;
    plan.bytes += round_up(task.tokens * task.features[i].stride * element_bytes, 128);
  }
  return plan;
}

int64_t shared_mlp_decode_workspace_bytes(const SharedMlpDecodeParams& params) {
  const DecodeTask task = make_decode_task(params);
  return plan_workspace(task, grid_blocks(task), element_size(params.dtype)).bytes;
}

void shared_mlp_decode(const SharedMlpDecodeParams& params, void* workspace, Stream stream) {
  DecodeTask task = make_decode_task(params);
  if (task.tokens == 0 || task.width == 0) {
    return;
  }
  FIPS_CHECK(is_aligned(workspace, kChunkBytes), kOp, ": workspace must be aligned to ",
             kChunkBytes, " bytes");
  task.blocks = grid_blocks(task);
  task.nonce = next_nonce();
  const DecodeWorkspace plan = plan_workspace(task, task.blocks, element_size(params.dtype));
  task.flags = static_cast<uint64_t*>(workspace);
  for (int i = 1; i < kDecodeStages; ++i) {
    task.features[i].data = static_cast<char*>(workspace) + plan.features_at[i];
  }
  const int max_shared_bytes = current_device().max_shared_bytes;
  switch (params.dtype) {
    case DType::kBFloat16:
      return launch_decode<BFloat16>(task, max_shared_bytes, stream);
    case DType::kFloat16:
      return launch_decode<Half>(task, max_shared_bytes, stream);
    default:
      return launch_decode<float>(task, max_shared_bytes, stream);
  }
}

}  // namespace fips::cuda
