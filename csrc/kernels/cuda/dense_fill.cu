#include "kernels/cuda/dense_fill.h"
#include "kernels/cuda/element_type.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/slice.cuh"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;

struct FillTask {
  BlockSparseView v;
  BitmapSlice bitmap;
  void* out;  // [cols, rows]
};

struct GatherTask {
  BlockSparseView v;
  BitmapSlice bitmap;
  const void* dense;  // [cols, rows]
  float* out;
  bool accumulate;
};

struct DequantiseTask {
  BlockSparseView v;
  BitmapSlice bitmap;
  void* out;  // [num_values]
};

// Calls body(slot, index) for every slot of stored block `id` (-1: an empty one): slots are spread
// over the threads, index is where the slot's value lies, -1 where none is stored.
template <class Body>
FIPS_DEVICE void for_each_slot(const BlockSparseView& v, const BitmapSlice& bitmap, int64_t id,
                               const Body& body) {
  const int slots = bitmap.slots;
  if (!v.is_bitmap()) {
    for (int slot = thread_index(); slot < slots; slot += kThreads) {
      body(slot, id < 0 ? int64_t{-1} : id * slots + slot);
    }
    return;
  }
  const int words = slots / 32, group = words < kWarpSize ? words : kWarpSize;
  for (int first = warp_index() * group; first < words; first += kThreads / kWarpSize * group) {
    walk_slots(bitmap, id, first, group, body);
  }
}

// Where slot (j, k) of the block at (block_row, block_column) lies in [cols, rows]; -1: padding.
FIPS_DEVICE int64_t dense_offset(const BlockSparseView& v, int64_t block_row, int64_t block_column,
                                 int slot) {
  const int64_t column = block_column * v.bn + slot / v.bk, row = block_row * v.bk + slot % v.bk;
  return column < v.cols && row < v.rows ? column * v.rows + row : -1;
}

// One block of the grid of V a thread block, stored or not: no zeroing pass of its own.
template <class T>
FIPS_KERNEL(kThreads, 4)
fill_kernel(const FillTask task) {
  const BlockSparseView& v = task.v;
  const int64_t row = block_index() % v.block_rows(), column = block_index() / v.block_rows();
  const T* values = static_cast<const T*>(v.values);
  for_each_slot(v, task.bitmap, find_block(v, row, column), [&](int slot, int64_t index) {
    const int64_t offset = dense_offset(v, row, column, slot);
    if (offset >= 0) {
      static_cast<T*>(task.out)[offset] = index >= 0 ? values[index] : T{};
    }
  });
}

// One stored block a thread block.
template <class T>
FIPS_KERNEL(kThreads, 4)
gather_kernel(const GatherTask task) {
  const BlockSparseView& v = task.v;
  const int64_t id = block_index(), row = v.row_idx[id], column = column_of_block(v, id);
  const T* dense = static_cast<const T*>(task.dense);
  for_each_slot(v, task.bitmap, id, [&](int slot, int64_t index) {
    const int64_t offset = row < 0 ? -1 : dense_offset(v, row, column, slot);
    if (index >= 0) {
      const float value = offset >= 0 ? to_float(dense[offset]) : 0.0f;
      task.out[index] = task.accumulate ? task.out[index] + value : value;
    }
  });
}

// One stored block a thread block.
template <class T>
FIPS_KERNEL(kThreads, 4)
dequantise_kernel(const DequantiseTask task) {
  const BlockSparseView& v = task.v;
  const int64_t id = block_index();
  for_each_slot(v, task.bitmap, id, [&](int slot, int64_t index) {
    if (index >= 0) {
      const float scale = to_float(v.scales[id * v.bn + slot / v.bk]);
      static_cast<T*>(task.out)[index] = from_float<T>(code_at(v.storage, v.values, index) * scale);
    }
  });
}

}  // namespace

void dequantise(const BlockSparseView& v, void* out, Stream stream) {
  check_sizes(v, "dequantise");
  const DequantiseTask task{v, make_bitmap(v), out};
  with_element_type("dequantise", v.dtype, [&](auto element) {
    launch<dequantise_kernel<decltype(element)>>("dequantise", {v.num_blocks, kThreads}, task,
                                                 stream);
  });
}

void fill_dense_transposed(const BlockSparseView& v, void* out, Stream stream) {
  check_sizes(v, "fill_dense_transposed");
  const FillTask task{v, make_bitmap(v), out};
  with_element_type("fill_dense_transposed", v.dtype, [&](auto element) {
    launch<fill_kernel<decltype(element)>>(
        "fill_dense_transposed", {v.block_rows() * v.block_cols(), kThreads}, task, stream);
  });
}

void gather_stored(const GatherParams& params, Stream stream) {
  check_sizes(params.v, "gather_stored");
  const GatherTask task{params.v, make_bitmap(params.v), params.dense,
                        static_cast<float*>(params.out), params.accumulate};
  with_element_type("gather_stored", params.dense_dtype, [&](auto element) {
    launch<gather_kernel<decltype(element)>>("gather_stored", {params.v.num_blocks, kThreads}, task,
                                             stream);
  });
}

}  // namespace fips::cuda
