// The block-sparse layout of one factor slice V (docs/format.md): a view over somebody else's
// memory.
//
// V has shape [rows, cols] = [r, n] and is cut into a grid of bk x bn blocks, absent or stored.
//   index     block compressed sparse column (BCSC): col_ptr, row_idx; plus the same blocks by
//   block row
//             (row_ptr, col_idx, block_id) without a second copy of the values.
//   `block`   values [num_blocks, bn, bk], k contiguous.
//   `bitmap`  mask [num_blocks, bn, bk / 8], bit k % 8 of byte k / 8 says whether slot (j, k) is
//   stored;
//             values packed in slot order, block b at block_ptr[b].
// Slots past a ragged edge are padding and hold zeros.
#pragma once

#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/math.h"
#include "core/types.h"

namespace fips {

struct BlockSparseView {
  int64_t rows = 0;
  int64_t cols = 0;
  int32_t bk = 0;
  int32_t bn = 0;
  int64_t num_blocks = 0;
  int64_t num_values = 0;
  DType dtype = DType::kFloat32;
  const void* values = nullptr;
  const int32_t* col_ptr = nullptr;
  const int32_t* row_idx = nullptr;
  const int32_t* row_ptr = nullptr;
  const int32_t* col_idx = nullptr;
  const int32_t* block_id = nullptr;
  const uint8_t* mask = nullptr;       // null: `block` encoding
  const int32_t* block_ptr = nullptr;  // null: `block` encoding

  FIPS_HOST_DEVICE int64_t block_rows() const { return (rows + bk - 1) / bk; }
  FIPS_HOST_DEVICE int64_t block_cols() const { return (cols + bn - 1) / bn; }
  FIPS_HOST_DEVICE int64_t slots() const { return static_cast<int64_t>(bk) * bn; }
  FIPS_HOST_DEVICE bool is_bitmap() const { return mask != nullptr; }
};

inline bool is_allowed_block_edge(int64_t edge) {
  return edge == 16 || edge == 32 || edge == 64 || edge == 128;
}

// Throws unless every index of `v` (host memory) stays inside the view: after this no kernel can
// read or write out of bounds, whatever the tensors hold. `name` is the argument's name in
// messages.
inline void check_view(const BlockSparseView& v, const char* name) {
  FIPS_CHECK(is_allowed_block_edge(v.bk) && is_allowed_block_edge(v.bn), name, ": block is ", v.bk,
             "x", v.bn, "; each edge must be 16, 32, 64 or 128");
  const int64_t nbk = v.block_rows(), nbn = v.block_cols();
  auto check_pointers = [&](const int32_t* ptr, int64_t count, const char* which) {
    FIPS_CHECK(ptr[0] == 0 && ptr[count] == v.num_blocks, name, ": ", which,
               " must start at 0 and end at ", v.num_blocks, " (the number of stored blocks), got ",
               ptr[0], " and ", ptr[count]);
    for (int64_t i = 0; i < count; ++i) {
      FIPS_CHECK(ptr[i] <= ptr[i + 1], name, ": ", which, " must not decrease, but entry ", i + 1,
                 " is ", ptr[i + 1], " after ", ptr[i]);
    }
  };
  auto check_entries = [&](const int32_t* index, int64_t limit, const char* which) {
    for (int64_t i = 0; i < v.num_blocks; ++i) {
      FIPS_CHECK(index[i] >= 0 && index[i] < limit, name, ": ", which, "[", i, "] is ", index[i],
                 "; it must lie in [0, ", limit, ")");
    }
  };
  check_pointers(v.col_ptr, nbn, "col_ptr");
  check_pointers(v.row_ptr, nbk, "row_ptr");
  check_entries(v.row_idx, nbk, "row_idx");
  check_entries(v.col_idx, nbn, "col_idx");
  check_entries(v.block_id, v.num_blocks, "block_id");
  if (!v.is_bitmap()) {
    FIPS_CHECK(v.num_values == v.num_blocks * v.slots(), name, ": values hold ", v.num_values,
               " numbers; ", v.num_blocks, " stored blocks of ", v.bk, "x", v.bn, " need ",
               v.num_blocks * v.slots());
    return;
  }
  FIPS_CHECK(v.block_ptr[0] == 0 && v.block_ptr[v.num_blocks] == v.num_values, name,
             ": block_ptr must start at 0 and end at ", v.num_values,
             " (the number of values), got ", v.block_ptr[0], " and ", v.block_ptr[v.num_blocks]);
  const int64_t mask_bytes = v.slots() / 8;
  for (int64_t b = 0; b < v.num_blocks; ++b) {
    int64_t ones = 0;
    for (int64_t i = 0; i < mask_bytes; i += 8) {
      uint64_t word;
      memcpy(&word, v.mask + b * mask_bytes + i, sizeof word);
      ones += __builtin_popcountll(word);
    }
    FIPS_CHECK(ones == int64_t{v.block_ptr[b + 1]} - v.block_ptr[b], name,
               ": the mask of stored block ", b, " keeps ", ones, " slots, but block_ptr gives it ",
               int64_t{v.block_ptr[b + 1]} - v.block_ptr[b], " values");
  }
}

}  // namespace fips
