// Random slices and a naive product to compare with.
#pragma once

#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "core/pack.h"
#include "core/parallel.h"

namespace fips::testing {

struct DenseSlice {
  int64_t rows, cols;
  std::vector<float> values;  // [rows, cols]
  std::vector<uint8_t> keep;
};

inline DenseSlice random_dense(int64_t rows, int64_t cols, double density, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  DenseSlice dense{rows, cols, std::vector<float>(rows * cols), std::vector<uint8_t>(rows * cols)};
  for (int64_t i = 0; i < rows * cols; ++i) {
    dense.keep[i] = uniform(generator) < density;
    dense.values[i] = dense.keep[i] ? normal(generator) : 0.0f;
  }
  return dense;
}

inline PackedSlice pack(const DenseSlice& dense, int32_t bk, int32_t bn, bool bitmap) {
  return fips::pack(dense.values.data(), dense.keep.data(), dense.rows, dense.cols, bk, bn,
                    sizeof(float), bitmap);
}

inline std::vector<float> random_vector(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

inline int64_t many_threads() { return 7; }

// Every range on a thread of its own: more threads than tasks, in any order.
inline void run_on_many_threads(int64_t tasks, int64_t grain, Parallel::Body body, void* context) {
  const int64_t step = max_of(max_of(1, grain), ceil_div(tasks, many_threads()));
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < tasks; begin += step) {
    threads.emplace_back(body, context, begin, min_of(tasks, begin + step));
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}
inline constexpr Parallel kManyThreads{run_on_many_threads, many_threads};

}  // namespace fips::testing
