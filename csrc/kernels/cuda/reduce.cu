#include "kernels/cuda/common.cuh"
#include "kernels/cuda/element_type.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.h"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResidentBlocks = 6;  // 1536 threads: all that some multiprocessors hold

struct AddTask {
  float* sums;
  const void* values;
  int64_t count;
};

template <class T>
FIPS_KERNEL(kThreads, kResidentBlocks)
add_kernel(const AddTask task) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i < task.count) {
    task.sums[i] += to_float(static_cast<const T*>(task.values)[i]);
  }
}

struct AddDoubleTask {
  double* sums;
  const double* values;
  int64_t count;
};

FIPS_KERNEL(kThreads, kResidentBlocks)
add_double_kernel(const AddDoubleTask task) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i < task.count) {
    task.sums[i] += task.values[i];
  }
}

struct ScaleTask {
  void* out;
  const float* sums;
  float scale;
  int64_t count;
};

template <class T>
FIPS_KERNEL(kThreads, kResidentBlocks)
scale_kernel(const ScaleTask task) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i < task.count) {
    static_cast<T*>(task.out)[i] = from_float<T>(task.scale * task.sums[i]);
  }
}

// Rows of one thread block of the first pass: enough blocks to fill a chip, few partial sums.
constexpr int kRowsPerBlock = 256;

struct ColumnTask {
  ColumnSumParams params;
  float* partial;  // [row blocks, cols]
  int64_t row_blocks, column_blocks;
};

// A column a thread, kRowsPerBlock rows.
template <class T>
FIPS_KERNEL(kThreads, kResidentBlocks)
partial_column_sums(const ColumnTask task) {
  const ColumnSumParams& p = task.params;
  const int64_t row_block = block_index() / task.column_blocks;
  const int64_t column = block_index() % task.column_blocks * kThreads + thread_index();
  if (column >= p.cols) {
    return;
  }
  const int64_t first = row_block * kRowsPerBlock, last = min_of(p.rows, first + kRowsPerBlock);
  const T* matrix = static_cast<const T*>(p.matrix) + column;
  float sum = 0;
  FIPS_UNROLL_BY(8)
  for (int64_t row = first; row < last; ++row) {
    sum += to_float(matrix[row * p.cols]);
  }
  task.partial[row_block * p.cols + column] = sum;
}

FIPS_KERNEL(kThreads, kResidentBlocks)
add_partial_column_sums(const ColumnTask task) {
  const int64_t column = block_index() * kThreads + thread_index();
  if (column >= task.params.cols) {
    return;
  }
  float sum = task.params.sums[column];
  for (int64_t row_block = 0; row_block < task.row_blocks; ++row_block) {
    sum += task.partial[row_block * task.params.cols + column];
  }
  task.params.sums[column] = sum;
}

}  // namespace

void add_into(float* sums, const void* values, DType dtype, int64_t count, Stream stream) {
  with_element_type("add_into", dtype, [&](auto element) {
    launch<add_kernel<decltype(element)>>("add_into", {ceil_div(count, kThreads), kThreads},
                                          AddTask{sums, values, count}, stream);
  });
}

void add_into(double* sums, const double* values, int64_t count, Stream stream) {
  launch<add_double_kernel>("add_into", {ceil_div(count, kThreads), kThreads},
                            AddDoubleTask{sums, values, count}, stream);
}

void scale_into(void* out, const float* sums, double scale, DType dtype, int64_t count,
                Stream stream) {
  with_element_type("scale_into", dtype, [&](auto element) {
    launch<scale_kernel<decltype(element)>>("scale_into", {ceil_div(count, kThreads), kThreads},
                                            ScaleTask{out, sums, static_cast<float>(scale), count},
                                            stream);
  });
}

int64_t add_column_sums_workspace(const ColumnSumParams& params) {
  return ceil_div(params.rows, kRowsPerBlock) * params.cols * int64_t{sizeof(float)};
}

void add_column_sums(const ColumnSumParams& params, void* workspace, Stream stream) {
  constexpr const char* kOp = "add_column_sums";
  const ColumnTask task{params, static_cast<float*>(workspace),
                        ceil_div(params.rows, kRowsPerBlock), ceil_div(params.cols, kThreads)};
  with_element_type(kOp, params.dtype, [&](auto element) {
    launch<partial_column_sums<decltype(element)>>(
        kOp, {task.row_blocks * task.column_blocks, kThreads}, task, stream);
  });
  if (params.rows > 0) {
    launch<add_partial_column_sums>(kOp, {task.column_blocks, kThreads}, task, stream);
  }
}

}  // namespace fips::cuda
