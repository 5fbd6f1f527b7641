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
// Values are of the type of x; or codes, whose value is code * scale of the row j of their block:
//   kInt8     one int8 each, scales float16 [num_blocks, bn]
//   kInt4     two to a byte, the low half first; in a bitmap every block starts with a whole byte
// Slots past a ragged edge are padding and hold zeros.
#pragma once

#include <cstdint>
#include <string>

#include "core/check.h"
#include "core/math.h"
#include "core/types.h"

namespace fips {

enum class Storage : int32_t { kPlain, kInt8, kInt4 };

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
  Storage storage = Storage::kPlain;
  const Half* scales = nullptr;  // null: kPlain

  FIPS_HOST_DEVICE int64_t block_rows() const { return (rows + bk - 1) / bk; }
  FIPS_HOST_DEVICE int64_t block_cols() const { return (cols + bn - 1) / bn; }
  FIPS_HOST_DEVICE int64_t slots() const { return static_cast<int64_t>(bk) * bn; }
  FIPS_HOST_DEVICE bool is_bitmap() const { return mask != nullptr; }
  FIPS_HOST_DEVICE bool is_quantised() const { return storage != Storage::kPlain; }
};

constexpr int64_t kMaxEdge = 128;

inline bool is_allowed_block_edge(int64_t edge) {
  return edge == 16 || edge == 32 || edge == 64 || edge == kMaxEdge;
}

// Throws unless block edges and lengths are as the layout asks; looks at no index.
inline void check_sizes(const BlockSparseView& v, const char* name) {
  FIPS_CHECK(is_allowed_block_edge(v.bk) && is_allowed_block_edge(v.bn), name, ": block is ", v.bk,
             "x", v.bn, "; each edge must be 16, 32, 64 or 128");
  FIPS_CHECK(v.is_bitmap() || v.num_values == v.num_blocks * v.slots(), name, ": values hold ",
             v.num_values, " numbers; ", v.num_blocks, " stored blocks of ", v.bk, "x", v.bn,
             " need ", v.num_blocks * v.slots());
}

// Throws unless the view is a well-formed slice, every index of it (host memory) included: after
// this no kernel can read or write out of bounds. `name` is the argument's name in messages.
inline void check_view(const BlockSparseView& v, const char* name) {
  check_sizes(v, name);
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
  check_pointers(v.col_ptr, nbn, "col_ptr");
  check_pointers(v.row_ptr, nbk, "row_ptr");
  auto check_entry = [&](int64_t value, int64_t limit, const char* which, int64_t i) {
    FIPS_CHECK(value >= 0 && value < limit, name, ": ", which, "[", i, "] is ", value,
               "; it must lie in [0, ", limit, ")");
  };
  for (int64_t column = 0; column < nbn; ++column) {
    for (int64_t b = v.col_ptr[column]; b < v.col_ptr[column + 1]; ++b) {
      check_entry(v.row_idx[b], nbk, "row_idx", b);
      FIPS_CHECK(b == v.col_ptr[column] || v.row_idx[b - 1] < v.row_idx[b], name,
                 ": row_idx must increase strictly inside a block column, but does not at entry ",
                 b);
    }
  }
  // Strictly increasing columns that each name a stored block of their own row: a permutation.
  for (int64_t row = 0; row < nbk; ++row) {
    for (int64_t i = v.row_ptr[row]; i < v.row_ptr[row + 1]; ++i) {
      check_entry(v.col_idx[i], nbn, "col_idx", i);
      check_entry(v.block_id[i], v.num_blocks, "block_id", i);
      const int32_t column = v.col_idx[i], b = v.block_id[i];
      FIPS_CHECK((i == v.row_ptr[row] || v.col_idx[i - 1] < column) && v.row_idx[b] == row &&
                     b >= v.col_ptr[column] && b < v.col_ptr[column + 1],
                 name, ": entry ", i,
                 " of the transposed index (row_ptr, col_idx, block_id) does not ",
                 "match col_ptr and row_idx; rebuild the slice with BlockSparse.from_index");
    }
  }
  if (!v.is_bitmap()) {
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
    const int64_t held = v.storage == Storage::kInt4 ? ones + ones % 2 : ones;
    FIPS_CHECK(held == int64_t{v.block_ptr[b + 1]} - v.block_ptr[b], name,
               ": the mask of stored block ", b, " keeps ", ones, " slots, but block_ptr gives it ",
               int64_t{v.block_ptr[b + 1]} - v.block_ptr[b], " values");
  }
}

}  // namespace fips
