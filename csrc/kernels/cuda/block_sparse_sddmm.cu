#include "kernels/cuda/block_sparse_sddmm.h"
#include "kernels/cuda/block_sparse_sddmm_kernel.cuh"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/element_type.h"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr const char* kOp = "block_sparse_sddmm";
constexpr int kAddThreads = 256;

struct AddTask {
  const float* partial;  // [splits, count]
  float* out;            // [count]
  int64_t count;
  int splits;
  bool accumulate;
};

// out (+)= the sum of all partial sums, in the order of the tokens.
FIPS_KERNEL(kAddThreads, 4)
add_partial_sums(const AddTask task) {
  const int64_t i = block_index() * kAddThreads + thread_index();
  if (i >= task.count) {
    return;
  }
  float sum = task.accumulate ? task.out[i] : 0.0f;
  for (int split = 0; split < task.splits; ++split) {
    sum += task.partial[split * task.count + i];
  }
  task.out[i] = sum;
}

SddmmSplit split_of(const BlockSparseSddmmParams& p) {
  return split_tokens(p.tokens, p.v.num_blocks, p.v.slots(), current_device().sm_count);
}

// A single range of tokens goes straight to the result.
bool is_direct(const SddmmSplit& split) { return split.splits == 1; }

}  // namespace

int64_t block_sparse_sddmm_workspace(const BlockSparseSddmmParams& params) {
  const SddmmSplit split = split_of(params);
  return is_direct(split)
             ? 0
             : split.splits * params.v.num_blocks * params.v.slots() * int64_t{sizeof(float)};
}

void block_sparse_sddmm(const BlockSparseSddmmParams& params, void* workspace, Stream stream) {
  check_sizes(params.v, kOp);
  FIPS_CHECK(has_sddmm_kernel(params.v), kOp,
             ": the CUDA kernel takes bfloat16 or float16 in the block encoding");
  const int64_t count = params.v.num_blocks * params.v.slots();
  if (count == 0) {
    return;
  }
  const SddmmSplit split = split_of(params);
  SddmmTask task{};
  task.v = params.v;
  task.a = params.a;
  task.b = params.b;
  task.a_stride = params.a_stride;
  task.b_stride = params.b_stride;
  task.tokens = params.tokens;
  task.wide_a = is_aligned(params.a, 16) && params.a_stride % 8 == 0;
  task.wide_b = is_aligned(params.b, 16) && params.b_stride % 8 == 0;
  task.splits = split.splits;
  task.split_tokens = split.split_tokens;
  task.accumulate = is_direct(split) && params.accumulate;
  task.partial = static_cast<float*>(is_direct(split) ? params.out : workspace);
  const int64_t tiles = ceil_div(params.v.rows, kSddmmTile) * ceil_div(params.v.cols, kSddmmTile);
  with_element_type(kOp, params.v.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      using Config = SddmmConfig<T>;
      launch<block_sparse_sddmm_mma<T>>(
          kOp, {tiles * split.splits, Config::kThreads, Config::kSharedBytes}, task, stream);
    }
  });
  if (!is_direct(split)) {
    launch<add_partial_sums>(
        kOp, {ceil_div(count, kAddThreads), kAddThreads},
        AddTask{static_cast<const float*>(workspace), static_cast<float*>(params.out), count,
                split.splits, params.accumulate},
        stream);
  }
}

}  // namespace fips::cuda
