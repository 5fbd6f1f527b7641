#include "core/pack.h"

#include <cstring>

#include "core/check.h"

namespace fips {
namespace {

void check_shape(int64_t rows, int64_t cols, int32_t bk, int32_t bn) {
  FIPS_CHECK(rows >= 0 && cols >= 0, "shape: got ", rows, "x", cols, "; both must be at least 0");
  FIPS_CHECK(is_allowed_block_edge(bk) && is_allowed_block_edge(bn), "block: got ", bk, "x", bn,
             "; each edge must be 16, 32, 64 or 128");
}

// Calls body(j, k, inside) for the slots of the block at (row, column) in storage order.
template <class F>
void for_each_slot(int64_t row, int64_t column, const PackedSlice& s, const F& body) {
  for (int64_t j = 0; j < s.bn; ++j) {
    for (int64_t k = 0; k < s.bk; ++k) {
      body(j, k, row + k < s.rows && column + j < s.cols);
    }
  }
}

bool any_kept(const uint8_t* keep, int64_t row, int64_t column, const PackedSlice& s) {
  for (int64_t k = row; k < min_of(row + s.bk, s.rows); ++k) {
    for (int64_t j = column; j < min_of(column + s.bn, s.cols); ++j) {
      if (keep[k * s.cols + j] != 0) {
        return true;
      }
    }
  }
  return false;
}

void append_block(const uint8_t* dense, const uint8_t* keep, int64_t row, int64_t column,
                  PackedSlice& s) {
  const int64_t size = s.element_size;
  if (!s.bitmap) {
    const size_t start = s.values.size();
    s.values.resize(start + static_cast<size_t>(s.bk * s.bn * size), 0);
    for_each_slot(row, column, s, [&](int64_t j, int64_t k, bool inside) {
      if (inside) {
        std::memcpy(&s.values[start + static_cast<size_t>((j * s.bk + k) * size)],
                    dense + ((row + k) * s.cols + column + j) * size, static_cast<size_t>(size));
      }
    });
    return;
  }
  const size_t mask_start = s.mask.size();
  s.mask.resize(mask_start + static_cast<size_t>(s.bk * s.bn / 8), 0);
  for_each_slot(row, column, s, [&](int64_t j, int64_t k, bool inside) {
    const int64_t at = (row + k) * s.cols + column + j;
    if (inside && keep[at] != 0) {
      s.mask[mask_start + static_cast<size_t>((j * s.bk + k) / 8)] |=
          static_cast<uint8_t>(1u << (k % 8));
      s.values.insert(s.values.end(), dense + at * size, dense + (at + 1) * size);
    }
  });
}

}  // namespace

BlockSparseView PackedSlice::view(DType dtype) const {
  BlockSparseView v;
  v.rows = rows;
  v.cols = cols;
  v.bk = bk;
  v.bn = bn;
  v.num_blocks = num_blocks();
  v.num_values = num_values();
  v.dtype = dtype;
  v.values = values.data();
  v.col_ptr = col_ptr.data();
  v.row_idx = row_idx.data();
  v.row_ptr = row_ptr.data();
  v.col_idx = col_idx.data();
  v.block_id = block_id.data();
  if (bitmap) {
    // An empty vector may have a null data pointer, but a null mask means the `block` encoding.
    static constexpr uint8_t kNoMask[8] = {};
    v.mask = mask.empty() ? kNoMask : mask.data();
    v.block_ptr = block_ptr.data();
  }
  return v;
}

PackedSlice pack(const void* dense, const uint8_t* keep, int64_t rows, int64_t cols, int32_t bk,
                 int32_t bn, int32_t element_size, bool bitmap) {
  check_shape(rows, cols, bk, bn);
  FIPS_CHECK(element_size == 2 || element_size == 4 || element_size == 8, "element_size: got ",
             element_size, "; allowed are 2, 4 and 8");
  PackedSlice s;
  s.rows = rows;
  s.cols = cols;
  s.bk = bk;
  s.bn = bn;
  s.element_size = element_size;
  s.bitmap = bitmap;
  s.col_ptr.push_back(0);
  for (int64_t column = 0; column < cols; column += bn) {
    for (int64_t row = 0; row < rows; row += bk) {
      if (any_kept(keep, row, column, s)) {
        s.row_idx.push_back(static_cast<int32_t>(row / bk));
        append_block(static_cast<const uint8_t*>(dense), keep, row, column, s);
      }
    }
    s.col_ptr.push_back(static_cast<int32_t>(s.row_idx.size()));
  }
  derive_index(s);
  return s;
}

void derive_index(PackedSlice& s) {
  check_shape(s.rows, s.cols, s.bk, s.bn);
  const int64_t nbk = ceil_div(s.rows, s.bk), nbn = ceil_div(s.cols, s.bn), blocks = s.num_blocks();
  FIPS_CHECK(static_cast<int64_t>(s.col_ptr.size()) == nbn + 1 && s.col_ptr[0] == 0 &&
                 s.col_ptr[static_cast<size_t>(nbn)] == blocks,
             "col_ptr: must hold ", nbn + 1, " entries from 0 to ", blocks);
  for (int64_t column = 0; column < nbn; ++column) {  // all of it before row_idx is read through it
    FIPS_CHECK(s.col_ptr[column] <= s.col_ptr[column + 1], "col_ptr: decreases at entry ",
               column + 1);
  }
  s.row_ptr.assign(static_cast<size_t>(nbk) + 1, 0);
  for (int64_t column = 0; column < nbn; ++column) {
    for (int64_t b = s.col_ptr[column]; b < s.col_ptr[column + 1]; ++b) {
      FIPS_CHECK(s.row_idx[b] >= 0 && s.row_idx[b] < nbk, "row_idx: entry ", b, " is ",
                 s.row_idx[b], "; it must lie in [0, ", nbk, ")");
      FIPS_CHECK(b == s.col_ptr[column] || s.row_idx[b - 1] < s.row_idx[b],
                 "row_idx: must increase strictly inside each block column, but does not at entry ",
                 b);
      ++s.row_ptr[static_cast<size_t>(s.row_idx[b]) + 1];
    }
  }
  for (int64_t row = 0; row < nbk; ++row) {
    s.row_ptr[row + 1] += s.row_ptr[row];
  }
  std::vector<int32_t> next(s.row_ptr.begin(), s.row_ptr.end() - 1);
  s.col_idx.resize(static_cast<size_t>(blocks));
  s.block_id.resize(static_cast<size_t>(blocks));
  for (int64_t column = 0; column < nbn; ++column) {
    for (int64_t b = s.col_ptr[column]; b < s.col_ptr[column + 1]; ++b) {
      const int32_t at = next[static_cast<size_t>(s.row_idx[b])]++;
      s.col_idx[at] = static_cast<int32_t>(column);
      s.block_id[at] = static_cast<int32_t>(b);
    }
  }
  if (!s.bitmap) {
    return;
  }
  const int64_t mask_bytes = int64_t{s.bk} * s.bn / 8;
  FIPS_CHECK(static_cast<int64_t>(s.mask.size()) == blocks * mask_bytes, "mask: must hold ",
             mask_bytes, " bytes for each of the ", blocks, " stored blocks, got ", s.mask.size());
  s.block_ptr.assign(1, 0);
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < mask_bytes; ++i) {
      total += __builtin_popcount(s.mask[static_cast<size_t>(b * mask_bytes + i)]);
    }
    FIPS_CHECK(total <= INT32_MAX, "values: a slice holds at most ", INT32_MAX, " values");
    s.block_ptr.push_back(static_cast<int32_t>(total));
  }
  FIPS_CHECK(total == s.num_values(), "values: the mask keeps ", total, " slots, but ",
             s.num_values(), " values are given");
}

void unpack(const PackedSlice& s, void* dense) {
  const int64_t size = s.element_size;
  auto* out = static_cast<uint8_t*>(dense);
  std::memset(out, 0, static_cast<size_t>(s.rows * s.cols * size));
  int64_t packed = 0;
  for (int64_t edge = 0; edge + 1 < static_cast<int64_t>(s.col_ptr.size()); ++edge) {
    for (int64_t b = s.col_ptr[edge]; b < s.col_ptr[edge + 1]; ++b) {
      const int64_t row = int64_t{s.row_idx[b]} * s.bk, column = edge * s.bn;
      for_each_slot(row, column, s, [&](int64_t j, int64_t k, bool inside) {
        const int64_t slot = j * s.bk + k, slots = int64_t{s.bk} * s.bn;
        int64_t from = b * slots + slot;
        if (s.bitmap) {
          if (((s.mask[static_cast<size_t>((b * slots + slot) / 8)] >> (k % 8)) & 1) == 0) {
            return;
          }
          from = packed++;
        }
        if (inside) {
          std::memcpy(out + ((row + k) * s.cols + column + j) * size,
                      &s.values[static_cast<size_t>(from * size)], static_cast<size_t>(size));
        }
      });
    }
  }
}

}  // namespace fips
