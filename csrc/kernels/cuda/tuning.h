// Thresholds between two ways to compute the same thing; tuning_table.h holds them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fips::cuda {

struct Tuning {
  int capability;               // 10 * major + minor; 0: of every GPU that is not listed
  int64_t dense_tokens;         // from here on a slice may be filled up with zeros
  int64_t bitmap_dense_tokens;  // from here on a `bitmap` slice is
  double mm_density;            // above this share of stored slots a slice is filled up
  double sddmm_density;         // above it a sampled product is computed whole and gathered
  double tiles_per_sm;          // so many tall token tiles must there be to use them
};

// The entry of a GPU, or the first one, which is that of all others.
template <size_t kSize>
const Tuning& tuning_of(const Tuning (&table)[kSize], int capability) {
  for (const Tuning& entry : table) {
    if (entry.capability == capability) {
      return entry;
    }
  }
  return table[0];
}

}  // namespace fips::cuda
