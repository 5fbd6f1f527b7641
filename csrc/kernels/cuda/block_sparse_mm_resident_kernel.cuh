// block_sparse_mm_resident: one thread block keeps a tile of tokens and computes a range of strips;
// after the tile is loaded its warps never wait for each other.
#pragma once

#include "kernels/cuda/block_sparse_mm_resident_plan.h"
#include "kernels/cuda/strip_hidden.cuh"

namespace fips::cuda {

template <class T, int kTokens_, bool kGated_>
struct ResidentConfig {
  using Element = T;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kGated = kGated_;
  static constexpr int kUnits = kTokens / kStripTokens;  // of one strip
  static constexpr int kThreads = kResidentWarps * kWarpSize;
};

template <class Config>
FIPS_KERNEL(Config::kThreads, 1)
block_sparse_mm_resident_kernel(const ResidentTask task) {
  using T = typename Config::Element;
  const BlockSparseMmParams& p = task.p;
  const int64_t tile_index = block_index() / task.plan.splits;
  const int split = static_cast<int>(block_index() % task.plan.splits);
  const int64_t first_token = tile_index * Config::kTokens;
  const TokenTile<T> tile{dynamic_shared_memory(), task.plan.stride};

  const int width = static_cast<int>(p.v.rows);
  load_token_tile<T, Config::kTokens, Config::kThreads>(static_cast<const T*>(p.x), p.x_stride,
                                                        {first_token, p.tokens}, width, tile);
  // Features past the last one multiply the padding of V's blocks and must be zeros.
  const int padding = (task.plan.stride - 32) / static_cast<int>(sizeof(T)) - width;
  for (int item = thread_index(); item < Config::kTokens * padding; item += Config::kThreads) {
    *tile.at(item / padding, width + item % padding) = T{};
  }
  cp_async_wait<0>();
  block_barrier();

  const HiddenTask hidden{p.v, task.gate, p.bias, task.gate_bias, task.activation};
  const int first_strip = split * task.plan.split_strips;
  const int strips = static_cast<int>(
      min_of(task.plan.split_strips, ceil_div(p.v.cols, kStripOutputs) - first_strip));
  for (int unit = warp_index(); unit < strips * Config::kUnits; unit += kResidentWarps) {
    const int column = (first_strip + unit / Config::kUnits) * kStripOutputs;
    const int token = unit % Config::kUnits * kStripTokens;
    const StripSums sums = hidden_strip<T, Config::kGated>(hidden, column, token, tile);
    store_strip_rows(sums, static_cast<T*>(p.out), p.out_stride, {first_token + token, p.tokens},
                     column, p.v.cols);
  }
}

}  // namespace fips::cuda
