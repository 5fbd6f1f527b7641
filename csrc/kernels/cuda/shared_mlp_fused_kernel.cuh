// shared_mlp_fused: one thread block computes y for a tile of tokens. Its warps share out strips of
// outputs (strip.cuh) within each of the stages z, chunks of h, w and y; only the stages are
// separated by barriers.
#pragma once

#include "kernels/cuda/shared_mlp_fused_plan.h"
#include "kernels/cuda/strip_hidden.cuh"

namespace fips::cuda {

template <class T, int kTokens_, bool kGated_>
struct FusedConfig {
  using Element = T;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kGated = kGated_;
  static constexpr int kUnits = kTokens / kStripTokens;  // of one strip
  static constexpr int kWarps = fused_warps(kGated), kKeptUnits = fused_kept_units(kGated);
  static constexpr int kThreads = kWarps * kWarpSize;
};

// Calls body(strip, first token) for this warp's share of `strips` strips.
template <class Config, class Body>
FIPS_DEVICE void for_each_unit(int strips, const Body& body) {
  for (int unit = warp_index(); unit < strips * Config::kUnits; unit += Config::kWarps) {
    body(unit / Config::kUnits, unit % Config::kUnits * kStripTokens);
  }
}

template <class Config>
FIPS_DEVICE void store_strip(const StripSums& sums, int token, int feature,
                             const TokenTile<typename Config::Element>& tile) {
  using T = typename Config::Element;
  FIPS_UNROLL
  for (int i = 0; i < kStripTokens / 8; ++i) {
    *reinterpret_cast<Quad<T>*>(tile.at(token + 8 * i + quad_token(), feature + quad_output())) =
        exchange_quad<T>(sums.value[i]);
  }
}

// z = x U. Features past the rank multiply the padding of V's blocks and must be zeros.
template <class Config>
FIPS_DEVICE void compute_z(const FusedTask& task, const TokenTile<typename Config::Element>& x,
                           const TokenTile<typename Config::Element>& z) {
  using T = typename Config::Element;
  const int rank = static_cast<int>(task.p.rank), steps = static_cast<int>(task.p.width) / 16;
  const T* base = static_cast<const T*>(task.p.base);
  for_each_unit<Config>(rank / kStripOutputs, [&](int strip, int token) {
    StripSums sums{};
    reduce_strip<T, true>(sums, steps, rank, x, token, [&](int step) {
      return StripStep<T>{base + int64_t{step} * 16 * rank + strip * kStripOutputs, step * 16};
    });
    store_strip<Config>(sums, token, strip * kStripOutputs, z);
  });
  const int columns = task.plan.z_features - rank;
  for (int item = thread_index(); item < Config::kTokens * columns; item += Config::kThreads) {
    *z.at(item / columns, rank + item % columns) = T{};
  }
}

FIPS_DEVICE HiddenTask hidden_of(const FusedTask& task) {
  const SharedMlpParams& p = task.p;
  return {p.up, task.gate, p.up_bias, p.gate_bias, p.activation};
}

// h of the chunk from hidden feature `first` on.
template <class Config>
FIPS_DEVICE void compute_h(const FusedTask& task, int first, int features,
                           const TokenTile<typename Config::Element>& z,
                           const TokenTile<typename Config::Element>& h) {
  using T = typename Config::Element;
  for_each_unit<Config>(features / kStripOutputs, [&](int strip, int token) {
    const int column = first + strip * kStripOutputs;
    const StripSums sums = hidden_strip<T, Config::kGated>(hidden_of(task), column, token, z);
    store_strip<Config>(sums, token, strip * kStripOutputs, h);
  });
}

// The sums of w that this warp keeps over all chunks, and how far each has come in its index list.
template <class Config>
struct KeptSums {
  StripSums sums[Config::kKeptUnits];
  int entry[Config::kKeptUnits];
};

template <class Config>
FIPS_DEVICE BlockRange row_range(const FusedTask& task, int strip) {
  const BlockSparseView& v = task.p.down;
  const int row = strip * kStripOutputs / v.bk;
  return clamp_range(v.row_ptr[row], v.row_ptr[row + 1], static_cast<int>(v.num_blocks),
                     static_cast<int>(v.block_cols()));
}

// How many entries from `entry` on lie before block column `end_column`, in a sorted list.
FIPS_DEVICE int entries_before(const BlockSparseView& v, int entry, int end, int64_t end_column) {
  int count = 0;
  for (int first = entry; first < end; first += kWarpSize) {
    const int mine = first + lane_index();
    const bool before = mine < end && v.col_idx[mine] < end_column;
    const int found = static_cast<int>(warp_sum(before ? 1 : 0));
    count += found;
    if (found < kWarpSize) {
      break;
    }
  }
  return count;
}

// kept += h of the chunk times V_down^T.
template <class Config>
FIPS_DEVICE void add_w(const FusedTask& task, int first, int features, KeptSums<Config>& kept,
                       const TokenTile<typename Config::Element>& h) {
  using T = typename Config::Element;
  const BlockSparseView& v = task.p.down;
  const int strips = static_cast<int>(task.p.rank_out) / kStripOutputs;
  const int columns = static_cast<int>(v.block_cols()), blocks = static_cast<int>(v.num_blocks);
  const int shift = log2_of_edge(v.bn), step_shift = shift - 4;
  FIPS_UNROLL
  for (int k = 0; k < Config::kKeptUnits; ++k) {
    const int unit = warp_index() + k * Config::kWarps;
    if (unit >= strips * Config::kUnits) {
      continue;
    }
    const int strip = unit / Config::kUnits, token = unit % Config::kUnits * kStripTokens;
    const BlockRange range = row_range<Config>(task, strip);
    const int begin = max_of(kept.entry[k], range.begin);
    const int count = entries_before(v, begin, range.end, (first + features) / v.bn);
    const int in_block = strip * kStripOutputs % v.bk;
    EntryWindow window;
    reduce_strip<T, true>(kept.sums[k], count << step_shift, v.bk, h, token, [&](int step) {
      const BlockRef block = window.at(begin + (step >> step_shift), begin + count, [&](int entry) {
        return checked_ref(v.block_id[entry], v.col_idx[entry], blocks, columns, shift);
      });
      const int offset = (step & ((1 << step_shift) - 1)) * 16,
                feature = block.feature + offset - first;
      const T* weights =
          static_cast<const T*>(v.values) + block.id * v.slots() + offset * v.bk + in_block;
      const bool inside = block.id >= 0 && feature >= 0 && feature < features;
      return StripStep<T>{inside ? weights : nullptr, feature};
    });
    kept.entry[k] = begin + count;
  }
}

template <class Config>
FIPS_DEVICE void store_w(const FusedTask& task, const KeptSums<Config>& kept,
                         const TokenTile<typename Config::Element>& w) {
  const int strips = static_cast<int>(task.p.rank_out) / kStripOutputs;
  FIPS_UNROLL
  for (int k = 0; k < Config::kKeptUnits; ++k) {
    const int unit = warp_index() + k * Config::kWarps;
    if (unit < strips * Config::kUnits) {
      store_strip<Config>(kept.sums[k], unit % Config::kUnits * kStripTokens,
                          unit / Config::kUnits * kStripOutputs, w);
    }
  }
}

// y = w U_out^T + bias
template <class Config>
FIPS_DEVICE void compute_y(const FusedTask& task, const TokenTile<typename Config::Element>& w) {
  using T = typename Config::Element;
  const SharedMlpParams& p = task.p;
  const int rank = static_cast<int>(p.rank_out);
  const T* base = static_cast<const T*>(p.base_out);
  const T* biases = static_cast<const T*>(p.down_bias);
  for_each_unit<Config>(static_cast<int>(p.width) / kStripOutputs, [&](int strip, int token) {
    StripSums sums{};
    reduce_strip<T, false>(sums, rank / 16, rank, w, token, [&](int step) {
      return StripStep<T>{base + int64_t{strip} * kStripOutputs * rank + step * 16, step * 16};
    });
    const int feature = strip * kStripOutputs + strip_order(lane_index() / 4);
    const float bias0 = biases == nullptr ? 0.0f : to_float(biases[feature]);
    const float bias1 = biases == nullptr ? 0.0f : to_float(biases[feature + 2]);
    FIPS_UNROLL
    for (int i = 0; i < kStripTokens / 8; ++i) {
      FIPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        sums.value[i][j] += j < 2 ? bias0 : bias1;
      }
    }
    store_strip_rows(sums, static_cast<T*>(p.y), p.y_stride,
                     {block_index() * Config::kTokens + token, p.tokens}, strip * kStripOutputs,
                     static_cast<int>(p.width));
  });
}

template <class Config>
FIPS_KERNEL(Config::kThreads, 1)
shared_mlp_fused_kernel(const FusedTask task) {
  using T = typename Config::Element;
  const FusedPlan& plan = task.plan;
  unsigned char* shared = dynamic_shared_memory();
  unsigned char* second = shared + plan.second_region;
  const TokenTile<T> x{shared, plan.x_stride}, h{shared, plan.h_stride};
  const TokenTile<T> z{second, plan.z_stride}, w{second, plan.w_stride};

  load_token_tile<T, Config::kTokens, Config::kThreads>(
      static_cast<const T*>(task.p.x), task.p.x_stride,
      {block_index() * Config::kTokens, task.p.tokens}, static_cast<int>(task.p.width), x);
  cp_async_wait<0>();
  block_barrier();
  compute_z<Config>(task, x, z);
  block_barrier();  // z is written, x is read
  KeptSums<Config> kept{};
  const int hidden = static_cast<int>(round_up(task.p.up.cols, task.p.up.bn));
  for (int first = 0; first < hidden; first += plan.chunk) {
    const int features = static_cast<int>(min_of(plan.chunk, hidden - first));
    compute_h<Config>(task, first, features, z, h);
    block_barrier();
    add_w<Config>(task, first, features, kept, h);
    block_barrier();  // h is read
  }
  store_w<Config>(task, kept, w);
  block_barrier();
  compute_y<Config>(task, w);
}

}  // namespace fips::cuda
