// Vectors of any element type, rounded from floats.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/types.h"

namespace fips::testing {

// Raw elements that start one element past an aligned address: no kernel may rely on more.
class Elements {
 public:
  Elements(const std::vector<float>& values, DType dtype)
      : dtype_(dtype), count_(static_cast<int64_t>(values.size())) {
    bytes_.resize(static_cast<size_t>((count_ + 1) * element_size(dtype)));
    for (int64_t i = 0; i < count_; ++i) {
      set(i, values[i]);
    }
  }

  void* data() { return bytes_.data() + element_size(dtype_); }
  const void* data() const { return bytes_.data() + element_size(dtype_); }

  double operator[](int64_t i) const {
    const char* at = bytes_.data() + (i + 1) * element_size(dtype_);
    switch (dtype_) {
      case DType::kFloat64:
        return read<double>(at);
      case DType::kBFloat16:
        return to_accumulator(read<BFloat16>(at));
      case DType::kFloat16:
        return to_accumulator(read<Half>(at));
      default:
        return read<float>(at);
    }
  }

 private:
  template <class T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  void set(int64_t i, float value) {
    char* at = bytes_.data() + (i + 1) * element_size(dtype_);
    auto write = [&](auto element) { std::memcpy(at, &element, sizeof element); };
    switch (dtype_) {
      case DType::kFloat64:
        return write(static_cast<double>(value));
      case DType::kBFloat16:
        return write(FromAccumulator<BFloat16>::convert(value));
      case DType::kFloat16:
        return write(FromAccumulator<Half>::convert(value));
      default:
        return write(value);
    }
  }

  DType dtype_;
  int64_t count_;
  std::vector<char> bytes_;
};

}  // namespace fips::testing
