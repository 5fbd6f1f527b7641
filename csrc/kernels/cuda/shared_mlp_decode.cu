#include <atomic>
#include <random>

#include "kernels/cuda/device_info.h"
#include "kernels/cuda/element_type.h"
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

void check_params(const SharedMlpParams& p) {
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

DecodeMatrix dense_matrix(const void* values, int64_t rows, int64_t cols, bool columns,
                          int64_t element) {
  DecodeMatrix m{};
  m.values = values;
  m.in_features = static_cast<int>(columns ? rows : cols);
  m.out_features = static_cast<int>(columns ? cols : rows);
  m.columns = columns;
  m.row_stride = static_cast<int>(cols);
  m.wide = is_aligned(values, kChunkBytes) && cols * element % kChunkBytes == 0;
  return m;
}

// `columns`: for h V^T, whose outputs are the contiguous rows of V.
DecodeMatrix slice_matrix(const BlockSparseView& v, bool columns) {
  DecodeMatrix m{};
  m.values = v.values;
  m.in_features = static_cast<int>(columns ? v.cols : v.rows);
  m.out_features = static_cast<int>(columns ? v.rows : v.cols);
  m.columns = columns;
  m.wide = is_aligned(v.values, kChunkBytes);
  m.range = columns ? v.row_ptr : v.col_ptr;
  m.reduce_index = columns ? v.col_idx : v.row_idx;
  m.block_id = columns ? v.block_id : nullptr;
  m.num_blocks = static_cast<int>(v.num_blocks);
  m.reduce_blocks = static_cast<int>(columns ? v.block_cols() : v.block_rows());
  m.slots = static_cast<int>(v.slots());
  m.out_shift = log2_of_edge(columns ? v.bk : v.bn);
  m.reduce_shift = log2_of_edge(columns ? v.bn : v.bk);
  m.k_shift = log2_of_edge(v.bk);
  m.bitmap = make_bitmap(v);
  m.wide_mask = is_aligned(v.mask, kChunkBytes);
  m.storage = v.storage;
  m.scales = v.scales;
  return m;
}

StageSplit split_stage(const DecodeTask& task, int stage, int64_t element, int sm_count) {
  const DecodeMatrix& m = task.matrix[matrix_of(stage, 0)];
  int64_t widest = widest_tile(m.columns, element), length = m.in_features;
  if (m.range != nullptr) {
    for (int which = 0; which < matrices_of(task, stage); ++which) {
      widest = min_of(widest, 1 << task.matrix[matrix_of(stage, which)].out_shift);
    }
    const int64_t out_blocks = ceil_div(m.out_features, 1 << m.out_shift);
    length = (int64_t{m.num_blocks} << m.reduce_shift) / max_of(1, out_blocks);
  }
  const int64_t step = m.columns ? kColumnStepReduce : kStageBytes / element;
  return choose_split(m.out_features, static_cast<int>(widest), length / step, sm_count);
}

void split_stages(DecodeTask& task, int64_t element, int sm_count) {
  // One block on each multiprocessor, since every block has to run while the others do.
  task.blocks = 1;
  for (int stage = 0; stage < kDecodeStages; ++stage) {
    const StageSplit split = split_stage(task, stage, element, sm_count);
    task.split[stage] = split;
    task.blocks = static_cast<int>(min_of(sm_count, max_of(task.blocks, split.units)));
    if (split.shares > 1) {
      const int floats = matrices_of(task, stage) * task.tokens * split.out_tile;
      task.partial_floats = static_cast<int>(max_of(task.partial_floats, floats));
    }
  }
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

DecodeTask make_decode_task(const SharedMlpParams& p, int sm_count) {
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
  for (const DecodeMatrix& m : task.matrix) {
    task.bitmap |= m.bitmap.mask != nullptr;
  }
  split_stages(task, element, sm_count);
  return task;
}

DecodeWorkspace plan_workspace(const DecodeTask& task, int64_t element_bytes) {
  DecodeWorkspace plan{};
  const auto add = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += round_up(bytes, 128);
    return at;
  };
  add(int64_t{kDecodeFlagRows} * task.blocks * 8);
  for (int i = 1; i < kDecodeStages; ++i) {
    plan.features_at[i] = add(task.tokens * task.features[i].stride * element_bytes);
  }
  plan.partial_at = add(int64_t{task.blocks} * task.partial_floats * 4);
  return plan;
}

void bind_workspace(DecodeTask& task, void* workspace, int64_t element_bytes) {
  const DecodeWorkspace plan = plan_workspace(task, element_bytes);
  char* memory = static_cast<char*>(workspace);
  task.flags = static_cast<uint64_t*>(workspace);
  for (int i = 1; i < kDecodeStages; ++i) {
    task.features[i].data = memory + plan.features_at[i];
  }
  task.partial = reinterpret_cast<float*>(memory + plan.partial_at);
}

int64_t shared_mlp_decode_workspace_bytes(const SharedMlpParams& params) {
  const DecodeTask task = make_decode_task(params, current_device().sm_count);
  return plan_workspace(task, element_size(params.dtype)).bytes;
}

void shared_mlp_decode(const SharedMlpParams& params, void* workspace, Stream stream) {
  const DeviceInfo device = current_device();
  DecodeTask task = make_decode_task(params, device.sm_count);
  if (task.tokens == 0 || task.width == 0) {
    return;
  }
  FIPS_CHECK(is_aligned(workspace, kChunkBytes), kOp, ": workspace must be aligned to ",
             kChunkBytes, " bytes");
  bind_workspace(task, workspace, element_size(params.dtype));
  task.nonce = next_nonce();
  with_element_type(kOp, params.dtype, [&](auto element) {
    launch_decode<decltype(element)>(task, device.max_shared_bytes, stream);
  });
}

}  // namespace fips::cuda
