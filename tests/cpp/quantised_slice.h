// A slice of codes, and the same slice with the values that the codes stand for.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "elements.h"
#include "slices.h"

namespace fips::testing {

// A buffer that ends where its content does, so that a read past it shows under ASan.
class QuantisedSlice {
 public:
  QuantisedSlice(int64_t rows, int64_t cols, int32_t bk, int32_t bn, bool bitmap, Storage storage,
                 DType dtype, double density, uint32_t seed)
      : storage_(storage), dtype_(dtype) {
    std::mt19937 generator(seed);
    const int32_t largest = storage == Storage::kInt8 ? 127 : 7;
    std::uniform_int_distribution<int32_t> code(-largest, largest);
    const DenseSlice kept = random_dense(rows, cols, density, seed);
    std::vector<int32_t> dense(static_cast<size_t>(rows * cols));
    for (size_t i = 0; i < dense.size(); ++i) {
      dense[i] = kept.keep[i] ? code(generator) : 0;
    }
    index_ =
        fips::pack(dense.data(), kept.keep.data(), rows, cols, bk, bn, sizeof(int32_t), bitmap);
    std::uniform_real_distribution<float> scale(0.01f, 0.02f);
    for (int64_t i = 0; i < index_.num_blocks() * bn; ++i) {
      scales_.push_back(FromAccumulator<Half>::convert(scale(generator)));
    }
    pack_codes();
    make_plain();
  }

  BlockSparseView view() const {
    BlockSparseView v = index_.view(dtype_);
    v.storage = storage_;
    v.values = codes_.data();
    v.scales = scales_.data();
    v.num_values = static_cast<int64_t>(codes_.size()) * (storage_ == Storage::kInt4 ? 2 : 1);
    if (v.is_bitmap()) {
      v.block_ptr = block_ptr_.data();
    }
    return v;
  }
  BlockSparseView plain_view() const { return plain_.view(dtype_); }
  const PackedSlice& plain() const { return plain_; }
  int64_t first_code(int64_t b) const {
    return index_.bitmap ? block_ptr_[b] : b * index_.bk * index_.bn;
  }

 private:
  int32_t code(int64_t i) const {
    int32_t value;
    std::memcpy(&value, index_.values.data() + i * sizeof value, sizeof value);
    return value;
  }
  int64_t first(int64_t b) const {
    return index_.bitmap ? index_.block_ptr[b] : b * index_.bk * index_.bn;
  }

  void pack_codes() {
    block_ptr_ = {0};
    for (int64_t b = 0; b < index_.num_blocks(); ++b) {
      for (int64_t i = first(b); i < first(b + 1); i += storage_ == Storage::kInt4 ? 2 : 1) {
        if (storage_ == Storage::kInt8) {
          codes_.push_back(static_cast<uint8_t>(code(i)));
        } else {
          const int32_t high = i + 1 < first(b + 1) ? code(i + 1) : 0;
          codes_.push_back(static_cast<uint8_t>((code(i) & 15) | (high & 15) << 4));
        }
      }
      const size_t held = codes_.size() * (storage_ == Storage::kInt4 ? 2 : 1);
      block_ptr_.push_back(static_cast<int32_t>(held));
    }
    codes_.shrink_to_fit();
  }

  void make_plain() {
    std::vector<float> values(static_cast<size_t>(index_.num_values()));
    int64_t next = 0;
    for (int64_t b = 0; b < index_.num_blocks(); ++b) {
      for (int64_t slot = 0; slot < index_.bk * index_.bn; ++slot) {
        const size_t byte = static_cast<size_t>((b * index_.bk * index_.bn + slot) / 8);
        if (index_.bitmap && ((index_.mask[byte] >> slot % 8) & 1) == 0) {
          continue;
        }
        values[next] = code(next) * to_accumulator(scales_[b * index_.bn + slot / index_.bk]);
        ++next;
      }
    }
    const Elements rounded(values, dtype_);
    plain_ = index_;
    plain_.element_size = static_cast<int32_t>(element_size(dtype_));
    const uint8_t* bytes = static_cast<const uint8_t*>(rounded.data());
    plain_.values.assign(bytes, bytes + next * plain_.element_size);
  }

  Storage storage_;
  DType dtype_;
  PackedSlice index_;  // with codes of 32 bits
  PackedSlice plain_;
  std::vector<uint8_t> codes_;
  std::vector<Half> scales_;
  std::vector<int32_t> block_ptr_;
};

inline constexpr int64_t kSliceRows = 150, kSliceCols = 170;

// Every kind of slice that codes are stored in.
template <class F>
void for_each_slice(double density, F&& body) {
  for (const auto& [bk, bn] : {std::pair(16, 16), std::pair(32, 128), std::pair(128, 64)}) {
    for (const bool bitmap : {false, true}) {
      for (const Storage storage : {Storage::kInt8, Storage::kInt4}) {
        for (const DType dtype :
             {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
          SCOPED_TRACE(::testing::Message()
                       << bk << "x" << bn << " bitmap=" << bitmap
                       << " int4=" << (storage == Storage::kInt4) << " " << dtype_name(dtype));
          body(QuantisedSlice(kSliceRows, kSliceCols, bk, bn, bitmap, storage, dtype, density, 5));
        }
      }
    }
  }
}

}  // namespace fips::testing
