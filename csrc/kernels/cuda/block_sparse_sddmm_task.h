// What one launch of block_sparse_sddmm works on, and how its tokens are split: plain host code.
#pragma once

#include <cstdint>

#include "kernels/block_sparse_sddmm.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

// A thread block sums one super-tile of V, kSddmmTile rows by as many columns, over a range of
// tokens, and skips what is not stored. Cells of kSddmmCell are the smallest block.
inline constexpr int kSddmmTile = 128;
inline constexpr int kSddmmCell = 16;
inline constexpr int kSddmmStepTokens = 32;  // in one pipeline stage

struct SddmmTask {
  BlockSparseView v;
  const void* a;  // [tokens, rows], rows a_stride apart
  const void* b;  // [tokens, cols], rows b_stride apart
  int64_t a_stride, b_stride, tokens;
  bool wide_a, wide_b;  // 16-byte accesses are aligned
  int splits;           // ranges of tokens
  int64_t split_tokens;
  float* partial;   // [splits, num_blocks, bn, bk]
  bool accumulate;  // partial += instead of =
};

struct SddmmSplit {
  int splits;
  int64_t split_tokens;  // of each range, a multiple of kSddmmStepTokens
};

// Few super-tiles hold stored blocks; ranges of tokens fill the chip. Every further range costs a
// write and a read of all sums, so a range has at least kLeastTokens.
inline SddmmSplit split_tokens(int64_t tokens, int64_t stored_blocks, int64_t block_slots,
                               int sm_count) {
  constexpr int64_t kLeastTokens = 512, kBlocksPerSm = 2;
  const int64_t tiles = max_of(1, stored_blocks * block_slots / (kSddmmTile * kSddmmTile));
  const int64_t wanted = ceil_div(kBlocksPerSm * sm_count, tiles);
  const int64_t most = max_of(1, tokens / kLeastTokens);
  const int64_t splits = max_of(1, min_of(wanted, most));
  const int64_t size = round_up(max_of(1, ceil_div(tokens, splits)), kSddmmStepTokens);
  return {static_cast<int>(max_of(1, ceil_div(tokens, size))), size};
}

}  // namespace fips::cuda
