// Packing of a dense matrix into the block-sparse layout and back, on raw elements of 2, 4 or 8
// bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "core/format.h"

namespace fips {

// An owned slice, as produced by pack().
struct PackedSlice {
  int64_t rows = 0, cols = 0;
  int32_t bk = 0, bn = 0;
  int32_t element_size = 0;
  bool bitmap = false;
  std::vector<int32_t> col_ptr, row_idx, row_ptr, col_idx, block_id, block_ptr;
  std::vector<uint8_t> mask;
  std::vector<uint8_t> values;  // raw elements

  int64_t num_blocks() const { return static_cast<int64_t>(row_idx.size()); }
  int64_t num_values() const { return static_cast<int64_t>(values.size()) / element_size; }
  // Bytes of what a checkpoint stores: values, column index and mask.
  int64_t stored_bytes() const {
    return static_cast<int64_t>(values.size() + mask.size() +
                                4 * (col_ptr.size() + row_idx.size()));
  }
  BlockSparseView view(DType dtype) const;
};

// Packs the slots of `dense` [rows, cols] (row-major) that `keep` [rows, cols] marks with a
// non-zero byte. `block`: a block with any kept slot is stored whole. `bitmap`: exactly the kept
// slots are stored.
PackedSlice pack(const void* dense, const uint8_t* keep, int64_t rows, int64_t cols, int32_t bk,
                 int32_t bn, int32_t element_size, bool bitmap);

// Fills the derived index (row_ptr, col_idx, block_id; block_ptr for bitmap) from col_ptr, row_idx
// and mask. Throws when those are inconsistent.
void derive_index(PackedSlice& slice);

// Writes the dense [rows, cols] matrix (row-major), zeros where nothing is stored.
void unpack(const PackedSlice& slice, void* dense);

}  // namespace fips
