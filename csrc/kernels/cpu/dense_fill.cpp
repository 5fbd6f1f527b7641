#include "kernels/dense_fill.h"

#include <cstring>

namespace fips::cpu {
namespace {

// Calls body(j, k, value index) for every stored slot of block `b` that lies inside the matrix.
template <class F>
void for_each_stored(const BlockSparseView& v, int64_t b, int64_t row, int64_t column,
                     const F& body) {
  const int64_t rows = min_of(v.bk, v.rows - row), cols = min_of(v.bn, v.cols - column);
  if (!v.is_bitmap()) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t k = 0; k < rows; ++k) {
        body(j, k, b * v.slots() + j * v.bk + k);
      }
    }
    return;
  }
  const uint8_t* mask = v.mask + b * v.slots() / 8;
  int64_t at = v.block_ptr[b];
  for (int64_t j = 0; j < v.bn; ++j) {
    for (int64_t k = 0; k < v.bk; k += 8) {
      for (uint32_t rest = mask[(j * v.bk + k) / 8]; rest != 0; rest &= rest - 1, ++at) {
        const int64_t slot = k + __builtin_ctz(rest);
        if (j < cols && slot < rows) {
          body(j, slot, at);
        }
      }
    }
  }
}

template <class T>
void fill(const BlockSparseView& v, T* out, const Parallel& parallel) {
  const T* values = static_cast<const T*>(v.values);
  parallel_for(parallel, v.block_cols(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t edge = begin; edge < end; ++edge) {
      const int64_t column = edge * v.bn;
      const int64_t cols = min_of(v.bn, v.cols - column);
      std::memset(out + column * v.rows, 0, static_cast<size_t>(cols * v.rows) * sizeof(T));
      for (int64_t b = v.col_ptr[edge]; b < v.col_ptr[edge + 1]; ++b) {
        const int64_t row = int64_t{v.row_idx[b]} * v.bk;
        T* target = out + column * v.rows + row;
        for_each_stored(v, b, row, column, [&](int64_t j, int64_t k, int64_t at) {
          target[j * v.rows + k] = values[at];
        });
      }
    }
  });
}

template <class T, class A>
void gather(const BlockSparseView& v, const T* dense, A* out, bool accumulate,
            const Parallel& parallel) {
  parallel_for(parallel, v.block_cols(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t edge = begin; edge < end; ++edge) {
      const int64_t column = edge * v.bn;
      for (int64_t b = v.col_ptr[edge]; b < v.col_ptr[edge + 1]; ++b) {
        const int64_t row = int64_t{v.row_idx[b]} * v.bk;
        const T* source = dense + column * v.rows + row;
        for_each_stored(v, b, row, column, [&](int64_t j, int64_t k, int64_t at) {
          out[at] = (accumulate ? out[at] : A(0)) + to_accumulator(source[j * v.rows + k]);
        });
      }
    }
  });
}

}  // namespace

void fill_dense_transposed(const BlockSparseView& v, void* out, const Parallel& parallel) {
  switch (element_size(v.dtype)) {
    case 8:
      return fill(v, static_cast<uint64_t*>(out), parallel);
    case 4:
      return fill(v, static_cast<uint32_t*>(out), parallel);
    default:
      return fill(v, static_cast<uint16_t*>(out), parallel);
  }
}

void gather_stored(const BlockSparseView& v, const void* dense, DType dense_dtype, void* out,
                   bool accumulate, const Parallel& parallel) {
  switch (dense_dtype) {
    case DType::kFloat32:
      return gather(v, static_cast<const float*>(dense), static_cast<float*>(out), accumulate,
                    parallel);
    case DType::kFloat64:
      return gather(v, static_cast<const double*>(dense), static_cast<double*>(out), accumulate,
                    parallel);
    case DType::kBFloat16:
      return gather(v, static_cast<const BFloat16*>(dense), static_cast<float*>(out), accumulate,
                    parallel);
    case DType::kFloat16:
      return gather(v, static_cast<const Half*>(dense), static_cast<float*>(out), accumulate,
                    parallel);
  }
}

}  // namespace fips::cpu
