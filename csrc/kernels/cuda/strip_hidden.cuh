// Strips of h = act(z V + bias), or act(z V_gate + gate_bias) * (z V + bias), for a tile of z in
// shared memory and slices in the `block` encoding.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/slice.cuh"
#include "kernels/cuda/strip.cuh"

namespace fips::cuda {

struct HiddenTask {
  const BlockSparseView& up;
  const BlockSparseView& gate;  // read only when gated
  const void* up_bias;          // or null
  const void* gate_bias;        // or null
  Activation activation;
};

// The entries of an index list, 32 at a time in the lanes of a warp: reading them one by one would
// put their latency between any two loads of weights.
class EntryWindow {
 public:
  // load(entry): the stored block and the block along the reduction.
  template <class Load>
  FIPS_DEVICE_MEMBER BlockRef at(int entry, int end, const Load& load) {
    if (entry < first_ || entry >= first_ + kWarpSize) {
      first_ = entry;
      const int mine = entry + lane_index();
      ref_ = mine < end ? load(mine) : BlockRef{-1, 0};
    }
    return {static_cast<int>(shuffle(static_cast<uint32_t>(ref_.id), entry - first_)),
            static_cast<int>(shuffle(static_cast<uint32_t>(ref_.feature), entry - first_))};
  }

 private:
  int first_ = -kWarpSize - 1;
  BlockRef ref_{-1, 0};
};

// sums += z times sixteen columns of V from `column` on.
template <class T>
FIPS_DEVICE void add_slice_columns(StripSums& sums, const BlockSparseView& v, int column, int token,
                                   const TokenTile<T>& z) {
  const int block_column = column / v.bn, in_block = column % v.bn;
  const int block_rows = static_cast<int>(v.block_rows()), blocks = static_cast<int>(v.num_blocks);
  const BlockRange range =
      clamp_range(v.col_ptr[block_column], v.col_ptr[block_column + 1], blocks, block_rows);
  const int shift = log2_of_edge(v.bk), step_shift = shift - 4;
  EntryWindow window;
  reduce_strip<T, false>(
      sums, (range.end - range.begin) << step_shift, v.bk, z, token, [&](int step) {
        const BlockRef block =
            window.at(range.begin + (step >> step_shift), range.end, [&](int entry) {
              return checked_ref(entry, v.row_idx[entry], blocks, block_rows, shift);
            });
        const int offset = (step & ((1 << step_shift) - 1)) * 16;
        const T* weights =
            static_cast<const T*>(v.values) + block.id * v.slots() + in_block * v.bk + offset;
        return StripStep<T>{block.id < 0 ? nullptr : weights, block.feature + offset};
      });
}

// The biases of a lane's outputs, strip_order(lane / 4) and two further; zeros past the last one.
template <class T>
struct StripBias {
  float value[2];

  FIPS_DEVICE_MEMBER StripBias(const void* biases, int column, int64_t limit) {
    FIPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int feature = column + strip_order(lane_index() / 4) + 2 * half;
      value[half] = biases != nullptr && feature < limit
                        ? to_float(static_cast<const T*>(biases)[feature])
                        : 0.0f;
    }
  }
};

// Sixteen features of h from `column` on, for the tokens of the tile from `token` on.
template <class T, bool kGated>
FIPS_DEVICE StripSums hidden_strip(const HiddenTask& task, int column, int token,
                                   const TokenTile<T>& z) {
  StripSums gate{}, up{};
  if constexpr (kGated) {
    add_slice_columns<T>(gate, task.gate, column, token, z);
  }
  add_slice_columns<T>(up, task.up, column, token, z);
  const StripBias<T> up_bias(task.up_bias, column, task.up.cols);
  const StripBias<T> gate_bias(task.gate_bias, column, task.up.cols);
  with_activation(task.activation, [&](auto activation) {
    constexpr Activation kKind = decltype(activation)::value;
    FIPS_UNROLL
    for (int i = 0; i < kStripTokens / 8; ++i) {
      FIPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& value = up.value[i][j];
        value += up_bias.value[j / 2];
        value = kGated ? activate<T>(kKind, gate.value[i][j] + gate_bias.value[j / 2]) * value
                       : activate<T>(kKind, value);
      }
    }
  });
  return up;
}

}  // namespace fips::cuda
