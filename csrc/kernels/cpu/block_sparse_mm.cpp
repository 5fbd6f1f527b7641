// Driver of block_sparse_mm: chooses prefill or decode, lays out the workspace, hands out tasks.
#include "kernels/block_sparse_mm.h"

#include <cstring>

#include "kernels/cpu/dispatch.h"

namespace fips::cpu {
namespace {

// Enough for every instruction set, so that the size does not depend on which one runs the kernel.
constexpr int64_t kMaxTokenTile = 32;
constexpr int64_t kPackedTokens = 4096;  // tokens packed at once: bounds the workspace

int64_t padded_inputs(const BlockSparseMmParams& p) {
  return round_up(p.in_features(), p.transpose ? p.v.bn : p.v.bk);
}

int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

template <class T>
void copy_row(const T* in, Accumulator<T>* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = to_accumulator(in[i]);
  }
}

// x as [token][padded feature] in the accumulator type, zero past the ragged edge.
void copy_rows(const BlockSparseMmParams& p, char* rows) {
  const int64_t size = accumulator_size(p.v.dtype), padded = padded_inputs(p),
                count = p.in_features();
  for (int64_t t = 0; t < p.tokens; ++t) {
    char* out = rows + t * padded * size;
    const char* in = static_cast<const char*>(p.x) + t * p.x_stride * element_size(p.v.dtype);
    std::memset(out + count * size, 0, static_cast<size_t>((padded - count) * size));
    switch (p.v.dtype) {
      case DType::kFloat32:
      case DType::kFloat64:
        std::memcpy(out, in, static_cast<size_t>(count * size));
        break;
      case DType::kBFloat16:
        copy_row(reinterpret_cast<const BFloat16*>(in), reinterpret_cast<float*>(out), count);
        break;
      case DType::kFloat16:
        copy_row(reinterpret_cast<const Half*>(in), reinterpret_cast<float*>(out), count);
        break;
    }
  }
}

BlockSparseMmParams token_range(BlockSparseMmParams p, int64_t first, int64_t count) {
  const int64_t size = element_size(p.v.dtype);
  p.x = static_cast<const char*>(p.x) + first * p.x_stride * size;
  p.out = static_cast<char*>(p.out) + first * p.out_stride * size;
  p.tokens = count;
  return p;
}

}  // namespace

int64_t block_sparse_mm_workspace(const BlockSparseMmParams& p) {
  const int64_t tokens = p.tokens <= kStreamTokens
                             ? p.tokens
                             : round_up(min_of(p.tokens, kPackedTokens), kMaxTokenTile);
  return max_of(64, tokens * padded_inputs(p) * accumulator_size(p.v.dtype));
}

void block_sparse_mm(const BlockSparseMmParams& p, void* workspace, const Parallel& parallel) {
  if (p.tokens == 0 || p.out_features() == 0) {
    return;
  }
  const KernelTable& kernels = kernel_table();
  const int64_t edges = p.transpose ? p.v.block_rows() : p.v.block_cols();
  if (p.tokens <= kStreamTokens) {
    copy_rows(p, static_cast<char*>(workspace));
    parallel_for(parallel, edges, 1,
                 [&](int64_t begin, int64_t end) { kernels.mm_stream(p, workspace, begin, end); });
    return;
  }
  const int64_t tile = kernels.mm_token_tile(p.v.dtype);
  for (int64_t first = 0; first < p.tokens; first += kPackedTokens) {
    const BlockSparseMmParams part = token_range(p, first, min_of(kPackedTokens, p.tokens - first));
    const int64_t tiles = ceil_div(part.tokens, tile);
    parallel_for(parallel, tiles, 1,
                 [&](int64_t begin, int64_t end) { kernels.mm_pack(part, workspace, begin, end); });
    const int64_t tasks = edges * ceil_div(tiles, kernels.mm_tiles_per_task(part));
    parallel_for(parallel, tasks, 1, [&](int64_t begin, int64_t end) {
      kernels.mm_tiled(part, workspace, begin, end);
    });
  }
}

}  // namespace fips::cpu
