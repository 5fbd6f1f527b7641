// The parts of a `bitmap` slice that a kernel reads. Plain data, passed to kernels by value.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "kernels/cuda/indexing.h"

namespace fips::cuda {

struct BitmapSlice {
  const void* values;        // [num_values]
  const uint8_t* mask;       // [num_blocks, bn, bk / 8]
  const int32_t* value_ptr;  // [num_blocks + 1]
  int64_t num_values;
  int slots;       // per stored block
  bool wide_mask;  // 4-byte accesses are aligned
};

inline BitmapSlice make_bitmap(const BlockSparseView& v) {
  return {v.values,
          v.mask,
          v.block_ptr,
          v.num_values,
          static_cast<int>(v.slots()),
          is_aligned(v.mask, 4)};
}

}  // namespace fips::cuda
