// Reading a slice in a kernel: finding stored blocks, walking the slots of a `bitmap` block.
// Indices in device memory cannot be validated on the host, so nothing here follows one that is out
// of range.
#pragma once

#include "kernels/cuda/bitmap_slice.h"
#include "kernels/cuda/common.cuh"

namespace fips::cuda {

FIPS_DEVICE uint32_t load_mask_word(const BitmapSlice& v, int64_t id, int word) {
  const uint8_t* source = v.mask + id * (v.slots / 8) + word * 4;
  if (v.wide_mask) {
    return *reinterpret_cast<const uint32_t*>(source);
  }
  return source[0] | uint32_t{source[1]} << 8 | uint32_t{source[2]} << 16 |
         uint32_t{source[3]} << 24;
}

// The `index`-th packed code of a quantised slice.
FIPS_DEVICE int code_at(Storage storage, const void* values, int64_t index) {
  if (storage == Storage::kInt8) {
    return static_cast<const int8_t*>(values)[index];
  }
  const int pair = static_cast<const uint8_t*>(values)[index / 2];
  return ((index % 2 == 0 ? pair & 15 : pair >> 4) ^ 8) - 8;
}

// One warp walks up to 32 mask words (32 slots each) of stored block `id` from `first_word` on and
// calls body(slot, index): index of the slot's value, or -1 where none is stored. A word is one
// step of the warp, a slot one lane: a lane finds its value by counting the ones before its own. id
// -1 is an empty block.
template <class Body>
FIPS_DEVICE void walk_slots(const BitmapSlice& v, int64_t id, int first_word, int words,
                            const Body& body) {
  const int lane = lane_index();
  uint32_t before = 0;
  for (int word = lane; id >= 0 && word < first_word; word += kWarpSize) {
    before += popcount(load_mask_word(v, id, word));
  }
  const uint32_t mine = id >= 0 && lane < words ? load_mask_word(v, id, first_word + lane) : 0;
  const uint32_t start = warp_sum(before) + warp_exclusive_sum(popcount(mine));
  const int64_t base = id >= 0 ? v.value_ptr[id] : 0;
  FIPS_UNROLL_BY(4)
  for (int word = 0; word < words; ++word) {
    const uint32_t bits = shuffle(mine, word);
    const int64_t index = base + shuffle(start, word) + popcount(bits & ((1u << lane) - 1u));
    // A mask and value_ptr that disagree must not lead out of the values.
    const bool stored = (bits >> lane & 1u) != 0 && index >= 0 && index < v.num_values;
    body((first_word + word) * 32 + lane, stored ? index : -1);
  }
}

// The stored block at (block_row, block_column), or -1, by bisection of the column's sorted rows.
FIPS_DEVICE int find_block(const BlockSparseView& v, int64_t block_row, int64_t block_column) {
  if (block_row >= v.block_rows() || block_column >= v.block_cols()) {
    return -1;
  }
  const BlockRange range =
      clamp_range(v.col_ptr[block_column], v.col_ptr[block_column + 1],
                  static_cast<int>(v.num_blocks), static_cast<int>(v.block_rows()));
  int first = range.begin, last = range.end;
  while (first < last) {
    const int middle = first + (last - first) / 2;
    if (v.row_idx[middle] < block_row) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first < range.end && v.row_idx[first] == block_row ? first : -1;
}

// The block column that stored block `id` belongs to: the last one that starts at or before it.
FIPS_DEVICE int64_t column_of_block(const BlockSparseView& v, int64_t id) {
  int64_t first = 0, last = v.block_cols();
  while (first + 1 < last) {
    const int64_t middle = first + (last - first) / 2;
    if (v.col_ptr[middle] <= id) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return first;
}

}  // namespace fips::cuda
