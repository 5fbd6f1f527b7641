// Driver of block_sparse_mm: chooses the kernel for the number of tokens, lays out the workspace,
// hands out tasks.
#include "kernels/block_sparse_mm.h"

#include <numeric>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/task_split.h"

namespace fips::cpu {
namespace {

constexpr int64_t kPanelBytes = 16 << 20;  // of x copied at once, unless it is this few tokens:
constexpr int64_t kMinPanelTokens = 512;
constexpr int64_t kBypassBytes = 8 << 20, kLineBytes = 64;

int64_t output_edges(const BlockSparseMmParams& p) {
  return p.transpose ? p.v.block_rows() : p.v.block_cols();
}

MmTask make_task(const BlockSparseMmParams& p, const MmEpilogue& epilogue = {},
                 std::atomic<bool>* stray = nullptr) {
  return {p, epilogue, stray, round_up(p.in_features(), p.transpose ? p.v.bn : p.v.bk)};
}

// Reading the blocks twice still beats making weight tiles for so few tokens.
bool streams(const KernelTable& kernels, const BlockSparseMmParams& p) {
  return p.tokens <= min_of(kFewTokens, 2 * kernels.mm_stream_tokens(p));
}

// Tokens that are packed, then multiplied, at a time: two groups per thread at most, so that their
// panels are still in that thread's cache; evenly, because weight tiles are made anew each time.
int64_t step_tokens(const KernelTable& kernels, const MmTask& task, int64_t threads) {
  const MmPanel panel = kernels.mm_panel(task.params.v.dtype);
  const int64_t fit = kPanelBytes / max_of(1, task.padded * panel.element_size);
  const int64_t near = round_up(kernels.mm_max_group(task), panel.rows) * threads * 2;
  const int64_t most = min_of(near, max_of(kMinPanelTokens, fit));
  const int64_t tokens = task.params.tokens;
  return round_up(ceil_div(tokens, ceil_div(tokens, most)), panel.rows);
}

BlockSparseMmParams token_range(BlockSparseMmParams p, int64_t first, int64_t count) {
  const int64_t size = element_size(p.v.dtype);
  p.x = static_cast<const char*>(p.x) + first * p.x_stride * size;
  p.out = static_cast<char*>(p.out) + first * p.out_stride * size;
  p.tokens = count;
  return p;
}

// The running sum over output edges of the blocks that a token meets there. Indices are not to be
// trusted yet.
std::vector<int64_t> edge_work(const MmTask& task) {
  constexpr int64_t kPerBlock = 8;  // against what every edge costs, whatever it stores
  const BlockSparseMmParams& p = task.params;
  const int64_t edges = output_edges(p);
  std::vector<int64_t> work(static_cast<size_t>(edges) + 1);
  auto add = [&](const BlockSparseView& v) {
    const int32_t* ptr = p.transpose ? v.row_ptr : v.col_ptr;
    for (int64_t e = 0; e < edges; ++e) {
      const int64_t blocks = int64_t{ptr[e + 1]} - ptr[e];
      work[e + 1] += kPerBlock * max_of(0, min_of(blocks, v.num_blocks)) + 1;
    }
  };
  add(p.v);
  if (task.epilogue.gate != nullptr) {
    add(*task.epilogue.gate);
  }
  std::partial_sum(work.begin(), work.end(), work.begin());
  return work;
}

// Outputs that no cache would keep until they are read are written past it, in whole lines; reading
// each line first would cost as much memory traffic again.
bool bypasses_cache(const BlockSparseMmParams& p) {
  const int64_t size = element_size(p.v.dtype), edge = p.transpose ? p.v.bk : p.v.bn;
  return p.tokens * p.out_features() * size >= kBypassBytes && edge * size % kLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % kLineBytes == 0 &&
         p.out_stride * size % kLineBytes == 0;
}

void run_streamed(const KernelTable& kernels, MmTask task, void* workspace,
                  const Parallel& parallel) {
  BlockSparseMmParams& p = task.params;
  if (kernels.mm_stream_element(task) != 0) {
    kernels.mm_stream_pack(task, workspace);
    p.x = workspace;
    p.x_stride = task.padded;
  }
  parallel_for(parallel, output_edges(p), 1,
               [&](int64_t begin, int64_t end) { kernels.mm_stream(task, begin, end); });
}

void run_tiled(const KernelTable& kernels, MmTask task, void* workspace, const Parallel& parallel) {
  const MmPanel panel = kernels.mm_panel(task.params.v.dtype);
  const int64_t tokens = task.params.tokens;
  parallel_for(parallel, ceil_div(tokens, panel.rows),
               max_of(1, 16384 / max_of(1, task.padded * panel.rows)),
               [&](int64_t begin, int64_t end) { kernels.mm_pack(task, workspace, begin, end); });
  task.panel = workspace;
  const int64_t threads = parallel.threads();
  const std::vector<int64_t> work = edge_work(task);
  task.group = choose_group(work, tokens, kernels.mm_max_group(task), panel.rows, threads,
                            task.params.in_features() > task.params.out_features());
  const TaskSplit split(work, tokens, task.group, threads);
  parallel_for(parallel, threads, 1, [&](int64_t begin, int64_t end) {
    kernels.mm_tiled(task, split.first(begin), split.first(end));
  });
}

}  // namespace

int64_t block_sparse_mm_workspace(const BlockSparseMmParams& p, const MmEpilogue& epilogue,
                                  const Parallel& parallel) {
  if (p.tokens == 0) {
    return 0;
  }
  const KernelTable& kernels = kernel_table();
  const MmTask task = make_task(p, epilogue);
  if (streams(kernels, p)) {
    return p.tokens * task.padded * kernels.mm_stream_element(task);
  }
  return step_tokens(kernels, task, parallel.threads()) * task.padded *
         kernels.mm_panel(p.v.dtype).element_size;
}

bool block_sparse_mm(const BlockSparseMmParams& p, const MmEpilogue& epilogue, void* workspace,
                     const Parallel& parallel) {
  if (p.tokens == 0 || p.out_features() == 0) {
    return true;
  }
  const KernelTable& kernels = kernel_table();
  std::atomic<bool> stray{false};
  if (streams(kernels, p)) {
    const int64_t most = kernels.mm_stream_tokens(p);
    for (int64_t first = 0; first < p.tokens; first += most) {
      const BlockSparseMmParams part = token_range(p, first, min_of(most, p.tokens - first));
      run_streamed(kernels, make_task(part, epilogue, &stray), workspace, parallel);
    }
    return !stray;
  }
  const int64_t step = step_tokens(kernels, make_task(p, epilogue), parallel.threads());
  const bool bypass = bypasses_cache(p);
  for (int64_t first = 0; first < p.tokens; first += step) {
    const BlockSparseMmParams part = token_range(p, first, min_of(step, p.tokens - first));
    MmTask task = make_task(part, epilogue, &stray);
    task.bypass = bypass;
    run_tiled(kernels, task, workspace, parallel);
  }
  return !stray;
}

}  // namespace fips::cpu
