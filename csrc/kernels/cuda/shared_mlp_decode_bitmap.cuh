// Expands a step of `bitmap` weights into the warp's slot, where it looks like a copied one. The
// warp counts the ones of the mask words that its outputs and positions lie in, keeps each word
// with its first value's index in shared memory, and then every lane looks up two neighbouring
// slots at a time.
#pragma once

#include "kernels/cuda/shared_mlp_decode_stream.cuh"

namespace fips::cuda {

// Of one warp: mask words of a step's positions at the widest edge, and the values of the block
// before each.
template <class T>
struct MaskScan {
  static constexpr int kWords = DecodeStep<T>::kReduce * 128 / 32;
  uint32_t bits[kWords];
  uint16_t before[kWords];  // a block has 16384 slots at most
};

FIPS_DEVICE uint32_t load_mask_word(const DecodeMatrix& m, int id, int word) {
  const uint8_t* source = m.mask + id * int64_t{m.slots / 8} + word * 4;
  if (m.wide_mask) {
    return *reinterpret_cast<const uint32_t*>(source);
  }
  return source[0] | uint32_t{source[1]} << 8 | uint32_t{source[2]} << 16 |
         uint32_t{source[3]} << 24;
}

// Words first_word ... first_word + words - 1 of stored block `id`. All lanes of a warp.
template <class T>
FIPS_DEVICE void scan_mask(const DecodeMatrix& m, int id, int first_word, int words,
                           MaskScan<T>& scan) {
  const int lane = lane_index();
  uint32_t mine = 0;
  for (int word = lane; word < first_word; word += kWarpSize) {
    mine += popcount(load_mask_word(m, id, word));
  }
  uint32_t before = warp_sum(mine);
  for (int first = 0; first < words; first += kWarpSize) {
    const int word = first + lane;
    const uint32_t bits = word < words ? load_mask_word(m, id, first_word + word) : 0;
    const uint32_t start = before + warp_exclusive_sum(popcount(bits));
    if (word < words) {
      scan.bits[word] = bits;
      scan.before[word] = static_cast<uint16_t>(start);
    }
    before = shuffle(start + popcount(bits), kWarpSize - 1);
  }
}

// The part of the step that one stored block covers: `positions` from `first` on.
template <class T>
FIPS_DEVICE void expand_part(const DecodeMatrix& m, int id, int out, int step, int first,
                             int positions, MaskScan<T>& scan, unsigned char* tile) {
  using Step = DecodeStep<T>;
  const int in_reduce = (step * Step::kReduce + first) & ((1 << m.reduce_shift) - 1);
  const int in_out = out & ((1 << m.out_shift) - 1);
  const int first_row = m.transposed ? in_reduce : in_out;
  const int first_k = m.transposed ? in_out : in_reduce;
  const int rows = m.transposed ? positions : kDecodeOut;
  constexpr int kReduceShift = sizeof(T) == 2 ? 6 : 5;
  const int pair_shift =  // log2 of the pairs in a row
      (m.transposed ? 4 : static_cast<int>(min_of(m.reduce_shift, kReduceShift))) - 1;
  const int first_word = (first_row << m.k_shift) / 32;
  const int64_t base = id < 0 ? 0 : m.value_ptr[id];
  if (id >= 0) {
    scan_mask(m, id, first_word, (rows << m.k_shift) / 32, scan);
  }
  warp_barrier();
  const T* values = static_cast<const T*>(m.values);
  FIPS_UNROLL_BY(4)
  for (int pair = lane_index(); pair < rows << pair_shift; pair += kWarpSize) {
    const int row = pair >> pair_shift, column = (pair & ((1 << pair_shift) - 1)) * 2;
    Pair<T> result{};
    if (id >= 0) {
      const int slot = ((first_row + row) << m.k_shift) + first_k + column;
      const int word = slot / 32 - first_word, bit = slot % 32;
      const uint32_t bits = scan.bits[word], low = bits >> bit & 1u, high = bits >> bit >> 1 & 1u;
      const int64_t index = base + scan.before[word] + popcount(bits & ((1u << bit) - 1u));
      // A mask and value_ptr that disagree must not lead out of the values.
      if (low != 0 && index >= 0 && index < m.num_values) {
        result.element[0] = values[index];
      }
      if (high != 0 && index + low >= 0 && index + low < m.num_values) {
        result.element[1] = values[index + low];
      }
    }
    const int offset =
        m.transposed ? column_tile_offset<Step::kOutChunks>(first + row, column / Step::kChunk)
                     : row_tile_offset(row, (first + column) / Step::kChunk);
    *reinterpret_cast<Pair<T>*>(tile + offset +
                                column % Step::kChunk * static_cast<int>(sizeof(T))) = result;
  }
  warp_barrier();
}

// All lanes of a warp; readers need no further barrier.
template <class T>
FIPS_DEVICE void expand_step(const DecodeMatrix& m, const StepMeta& meta, int tile_index,
                             MaskScan<T>& scan, unsigned char* tile) {
  using Step = DecodeStep<T>;
  const int edge = 1 << m.reduce_shift;
  const int positions = edge < Step::kReduce ? edge : Step::kReduce;
  for (int first = 0; first < Step::kReduce; first += positions) {
    expand_part<T>(m, meta.id[first / kDecodeGroup], tile_index * kDecodeOut, meta.step, first,
                   positions, scan, tile);
  }
}

}  // namespace fips::cuda
