// Hopper's instructions as the kernels see them (csrc/kernels/cuda/ptx_sm90.cuh), each in
// isolation: layouts against naive products and copies, and that misuse is loud.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx_sm90.cuh"

namespace fips::cuda {
namespace {

constexpr int kBarrierBytes = 1024;  // after the tiles

std::vector<BFloat16> random_matrix(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<BFloat16> values(count);
  for (BFloat16& value : values) {
    value = FromAccumulator<BFloat16>::convert(normal(random));
  }
  return values;
}

TensorMap map_of(const std::vector<BFloat16>& matrix, int64_t rows, int64_t cols, int box_rows) {
  return make_tensor_map(matrix.data(), {DType::kBFloat16, rows, cols, cols, box_rows, 64});
}

template <auto kKernel, class Task>
void run(const Task& task, int threads, int shared_bytes, bool reverse = false) {
  emulation::settings() = {{1, 90, 227 * 1024}, reverse};
  launch<kKernel>("test", {1, threads, shared_bytes}, task, nullptr);
  emulation::settings() = {};
}

// The message of the error that misuse must raise.
template <class Run>
std::string error_of(const Run& run_kernel) {
  try {
    run_kernel();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// ---- layouts

TEST(Sm90Layout, SwizzleIsThePermutationOfTheCopies) {
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const auto address = static_cast<uint32_t>(row * 128 + chunk * 16);
      EXPECT_EQ(swizzle_128(address), static_cast<uint32_t>(swizzled_offset<8>(row, chunk)));
      EXPECT_EQ(swizzle_128(address + 6), swizzle_128(address) + 6);
    }
  }
}

TEST(Sm90Layout, DescriptorBits) {
  // Start 0x2000, leading 16 bytes, stride 1024 bytes, swizzle mode 1: hand-encoded.
  EXPECT_EQ(mma_descriptor(0x2000), 0x4000004000010200ull);
  EXPECT_EQ(mma_descriptor(0x2000, 8192), 0x4000004002000200ull);
}

TEST(Sm90Layout, AccumulatorsCoverTheTileOnce) {
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    for (int i = 0; i < 96; ++i) {
      const Coord at = mma_accumulator(thread, i);
      EXPECT_TRUE(at.row >= 0 && at.row < 64 && at.col >= 0 && at.col < 192);
      EXPECT_TRUE(seen.insert({at.row, at.col}).second);
    }
  }
}

// ---- wgmma

struct MmaTask {
  TensorMap a, b;
  float* d;  // [64, n]
  bool fence = true;
};

// d = a b with k = 64: A and B come by tensor loads from row-major matrices, [m][k] and [n][k] for
// K major, [k][m] and [k][n] (64 columns a tile) for MN major. Runs twice, the second time adding.
template <int kN, MmaMajor kA, MmaMajor kB>
void mma_kernel(const MmaTask task) {
  unsigned char* shared = dynamic_tile_memory();
  const SharedAddress a = shared_address(shared), b = a + 8192, barrier = b + kN * 128;
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 8192 + kN * 128);
    tensor_load(a, task.a, 0, 0, barrier);
    for (int tile = 0; tile < (kB == MmaMajor::kMN ? kN / 64 : 1); ++tile) {
      tensor_load(b + tile * 8192, task.b, tile * 64, 0, barrier);
    }
  }
  block_barrier();
  mbarrier_wait(barrier, 0);
  float sums[kN / 2];
  for (int round = 0; round < 2; ++round) {
    if (task.fence) {
      wgmma_fence();
    }
    for (int k = 0; k < 4; ++k) {
      wgmma<BFloat16, kN, kA, kB>(
          sums, mma_descriptor(shared_window_address(a)) + k * mma_reduce_step(kA),
          mma_descriptor(shared_window_address(b), 8192) + k * mma_reduce_step(kB),
          round > 0 || k > 0);
    }
    wgmma_commit();
    EXPECT_TRUE(std::isnan(sums[0])) << "in flight";
    wgmma_wait<0>();
  }
  for (int i = 0; i < kN / 2; ++i) {
    const Coord at = mma_accumulator(thread_index(), i);
    task.d[at.row * kN + at.col] = sums[i];
  }
}

template <int kN, MmaMajor kA, MmaMajor kB>
void expect_product() {
  const std::vector<BFloat16> a = random_matrix(64 * 64, 1), b = random_matrix(64 * kN, 2);
  std::vector<float> d(64 * kN, NAN);
  const bool b_rows_are_k = kB == MmaMajor::kMN;
  const MmaTask task{map_of(a, 64, 64, 64),
                     b_rows_are_k ? map_of(b, 64, kN, 64) : map_of(b, kN, 64, kN), d.data()};
  for (const bool reverse : {false, true}) {
    run<mma_kernel<kN, kA, kB>>(task, 128, 8192 + kN * 128 + kBarrierBytes, reverse);
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < kN; ++n) {
        double sum = 0;
        for (int k = 0; k < 64; ++k) {
          const double left = to_accumulator(a[kA == MmaMajor::kMN ? k * 64 + m : m * 64 + k]);
          sum += left * to_accumulator(b[b_rows_are_k ? k * kN + n : n * 64 + k]);
        }
        ASSERT_NEAR(d[m * kN + n], 2 * sum, 1e-3) << m << ", " << n;
      }
    }
  }
}

TEST(Sm90Mma, EveryMajorAgainstANaiveProduct) {
  expect_product<64, MmaMajor::kReduce, MmaMajor::kReduce>();
  expect_product<64, MmaMajor::kMN, MmaMajor::kReduce>();
  expect_product<192, MmaMajor::kReduce, MmaMajor::kReduce>();
  expect_product<128, MmaMajor::kReduce, MmaMajor::kMN>();
  expect_product<256, MmaMajor::kMN, MmaMajor::kMN>();
}

TEST(Sm90Mma, NeedsAFence) {
  const std::vector<BFloat16> a = random_matrix(64 * 64, 1);
  std::vector<float> d(64 * 64);
  const MmaTask task{map_of(a, 64, 64, 64), map_of(a, 64, 64, 64), d.data(), false};
  const std::string error = error_of([&] {
    run<mma_kernel<64, MmaMajor::kReduce, MmaMajor::kReduce>>(task, 128, 16384 + kBarrierBytes);
  });
  EXPECT_NE(error.find("without a wgmma.fence"), std::string::npos) << error;
}

// ---- tensor copies

struct CopyTask {
  TensorMap from, to;
  int column, row, expected_bytes;
  bool init_fence = true, wait_store = true;
};

// Loads the box at {column, row} and stores it at the same place of `to`.
void copy_kernel(const CopyTask task) {
  const SharedAddress tile = shared_address(dynamic_tile_memory()), barrier = tile + 8192;
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    if (task.init_fence) {
      mbarrier_init_fence();
    }
    mbarrier_arrive_expect(barrier, task.expected_bytes);
    tensor_load(tile, task.from, task.column, task.row, barrier);
    mbarrier_wait(barrier, 0);
    tensor_store(task.to, task.column, task.row, tile);
    tensor_store_commit();
    if (task.wait_store) {
      tensor_store_wait_read<0>();
    }
  }
}

TEST(Sm90Copy, OutsideIsZeroOnLoadsAndDroppedOnStores) {
  constexpr int kRows = 70, kCols = 72;
  const std::vector<BFloat16> from = random_matrix(kRows * kCols, 3);
  for (const auto& [column, row] : {std::pair{0, 0}, {64, 64}, {-8, -5}, {72, 0}, {0, 70}}) {
    std::vector<BFloat16> to(kRows * kCols, BFloat16{0x7fff});
    // A larger target: what lies outside `from` arrives in it as zeros.
    std::vector<BFloat16> wide(256 * 256, BFloat16{0x7fff});
    CopyTask task{map_of(from, kRows, kCols, 64), map_of(to, kRows, kCols, 64), column, row, 8192};
    run<copy_kernel>(task, 32, 8192 + kBarrierBytes);
    task.to = map_of(wide, 256, 256, 64);
    run<copy_kernel>(task, 32, 8192 + kBarrierBytes);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCols; ++c) {
        const bool in_box = r >= row && r < row + 64 && c >= column && c < column + 64;
        ASSERT_EQ(to[r * kCols + c].bits, in_box ? from[r * kCols + c].bits : 0x7fff);
      }
    }
    for (int r = std::max(0, row); r < row + 64; ++r) {
      for (int c = std::max(0, column); c < column + 64; ++c) {
        ASSERT_EQ(wide[r * 256 + c].bits, r < kRows && c < kCols ? from[r * kCols + c].bits : 0);
      }
    }
  }
}

TEST(Sm90Copy, MisuseIsLoud) {
  const std::vector<BFloat16> from = random_matrix(64 * 64, 3);
  const CopyTask right{map_of(from, 64, 64, 64), map_of(from, 64, 64, 64), 0, 0, 8192};
  const auto error = [](const CopyTask& task) {
    return error_of([&] { run<copy_kernel>(task, 32, 8192 + kBarrierBytes); });
  };
  EXPECT_EQ(error(right), "no error");
  CopyTask task = right;
  task.expected_bytes = 8192 + 16;
  EXPECT_NE(error(task).find("still expects 16 bytes"), std::string::npos) << error(task);
  task.expected_bytes = 4096;
  EXPECT_NE(error(task).find("4096 bytes more"), std::string::npos) << error(task);
  task = right;
  task.init_fence = false;
  EXPECT_NE(error(task).find("without init fence"), std::string::npos) << error(task);
  task = right;
  task.wait_store = false;
  EXPECT_NE(error(task).find("has yet to read"), std::string::npos) << error(task);
}

TEST(Sm90Copy, TensorsTheEngineRefuses) {
  const std::vector<BFloat16> data = random_matrix(1024, 4);
  EXPECT_TRUE(tensor_map_accepts(data.data(), 4, 60, 64));
  EXPECT_FALSE(tensor_map_accepts(data.data() + 1, 4, 60, 64));
  EXPECT_FALSE(tensor_map_accepts(data.data(), 4, 60, 63));
  EXPECT_FALSE(tensor_map_accepts(data.data(), 4, 65, 64));
  EXPECT_FALSE(tensor_map_accepts(data.data(), 0, 60, 64));
  EXPECT_FALSE(tensor_map_accepts(nullptr, 4, 60, 64));
  EXPECT_THROW(make_tensor_map(data.data(), {DType::kBFloat16, 4, 64, 64, 64, 32}), Error);
  EXPECT_THROW(make_tensor_map(data.data(), {DType::kBFloat16, 4, 64, 64, 257, 64}), Error);
  EXPECT_THROW(make_tensor_map(data.data(), {DType::kFloat32, 4, 64, 64, 64, 64}), Error);
}

// ---- transposed stores of accumulators

struct StoreTask {
  TensorMap out;
  bool fence;
};

// Every accumulator of a 64 x 64 tile holds row * 64 + column, which float16 represents.
void store_kernel(const StoreTask task) {
  const SharedAddress tile = shared_address(dynamic_tile_memory());
  const int thread = thread_index();
  for (int column = 0; column < 64; column += 16) {
    uint32_t pairs[4];
    for (int i = 0; i < 4; ++i) {
      const Coord at = mma_accumulator(thread, column / 2 + 2 * i);
      pairs[i] = pack_pair<Half>(static_cast<float>(at.row * 64 + at.col),
                                 static_cast<float>(at.row * 64 + at.col + 1));
    }
    stmatrix_x4_transposed(tile + transposed_store_offset(thread, column), pairs);
  }
  if (task.fence) {
    fence_shared_writes();
  }
  named_barrier(3, 128);
  if (thread == 0) {
    tensor_store(task.out, 0, 0, tile);
    tensor_store_commit();
    tensor_store_wait_read<0>();
  }
}

TEST(Sm90Store, AccumulatorsArriveTransposed) {
  std::vector<Half> out(64 * 64);
  const TensorMap map = make_tensor_map(out.data(), {DType::kFloat16, 64, 64, 64, 64, 64});
  for (const bool reverse : {false, true}) {
    run<store_kernel>(StoreTask{map, true}, 128, 8192, reverse);
    for (int column = 0; column < 64; ++column) {
      for (int row = 0; row < 64; ++row) {
        const int value = row * 64 + column;  // above 2048 float16 rounds to multiples of 2
        ASSERT_NEAR(to_accumulator(out[column * 64 + row]), value, value < 2048 ? 0 : 1);
      }
    }
  }
}

TEST(Sm90Store, NeedsTheProxyFence) {
  std::vector<Half> out(64 * 64);
  const TensorMap map = make_tensor_map(out.data(), {DType::kFloat16, 64, 64, 64, 64, 64});
  const std::string error = error_of([&] { run<store_kernel>(StoreTask{map, false}, 128, 8192); });
  EXPECT_NE(error.find("without fence.proxy.async"), std::string::npos) << error;
}

// Eight rows of a matrix go to eight different groups of four banks.
TEST(Sm90Store, NoBankConflicts) {
  for (int warp = 0; warp < 4; ++warp) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::set<uint32_t> groups;
      for (int column = 0; column < 8; ++column) {
        groups.insert(transposed_store_offset(warp * 32 + matrix * 8 + column, 0) / 16 % 8);
      }
      EXPECT_EQ(groups.size(), 8u);
    }
  }
}

// ---- mbarriers, named barriers, registers

struct RingTask {
  int rounds, slots;
  int* log;  // [rounds], what each round read
};

// Warp 0 hands numbers to warp 1 through a ring of slots.
void ring_kernel(const RingTask task) {
  unsigned char* shared = dynamic_tile_memory();
  int* values = reinterpret_cast<int*>(shared);
  const SharedAddress full = shared_address(shared) + 512, empty = full + task.slots * 8;
  if (thread_index() == 0) {
    for (int slot = 0; slot < task.slots; ++slot) {
      mbarrier_init(full + slot * 8, 32);
      mbarrier_init(empty + slot * 8, 32);
    }
    mbarrier_init_fence();
  }
  block_barrier();
  const int lane = thread_index() % 32;
  for (int round = 0; round < task.rounds; ++round) {
    const int slot = round % task.slots;
    const uint32_t parity = static_cast<uint32_t>(round / task.slots) & 1;
    if (thread_index() < 32) {
      mbarrier_wait(empty + slot * 8, parity ^ 1);
      values[slot * 32 + lane] = round * 100 + lane;
      mbarrier_arrive(full + slot * 8);
    } else {
      mbarrier_wait(full + slot * 8, parity);
      if (lane == 0) {
        for (int i = 0; i < 32; ++i) {
          task.log[round] += values[slot * 32 + i] == round * 100 + i;
        }
      }
      mbarrier_arrive(empty + slot * 8);
    }
  }
}

TEST(Sm90Barrier, PhasesHandOverARing) {
  for (const bool reverse : {false, true}) {
    std::vector<int> log(11);
    run<ring_kernel>(RingTask{11, 3, log.data()}, 64, 1024, reverse);
    EXPECT_EQ(log, std::vector<int>(11, 32));
  }
}

enum class Misuse { kUninitialised, kOverwritten, kTooManyArrivals, kNobodyArrives, kNamedCount };

struct MisuseTask {
  Misuse what;
};

void misuse_kernel(const MisuseTask task) {
  unsigned char* shared = dynamic_tile_memory();
  const SharedAddress barrier = shared_address(shared);
  const bool first = thread_index() == 0;
  switch (task.what) {
    case Misuse::kUninitialised:
      return mbarrier_wait(barrier, 0);
    case Misuse::kOverwritten:
      if (first) {
        mbarrier_init(barrier, 1);
        shared[3] = 0;
        mbarrier_arrive(barrier);
      }
      return;
    case Misuse::kTooManyArrivals:
      if (first) {
        mbarrier_init(barrier, 1);
        mbarrier_arrive_expect(barrier, 16);
        mbarrier_arrive(barrier);
      }
      return;
    case Misuse::kNobodyArrives:
      if (first) {
        mbarrier_init(barrier, 1);
        mbarrier_wait(barrier, 0);
      }
      return;
    case Misuse::kNamedCount:
      return named_barrier(1, thread_index() < 32 ? 64 : 32);
  }
}

TEST(Sm90Barrier, MisuseIsLoud) {
  const auto error = [](Misuse what) {
    return error_of([&] { run<misuse_kernel>(MisuseTask{what}, 64, 64); });
  };
  EXPECT_NE(error(Misuse::kUninitialised).find("not initialised"), std::string::npos);
  EXPECT_NE(error(Misuse::kOverwritten).find("overwrote"), std::string::npos);
  EXPECT_NE(error(Misuse::kTooManyArrivals).find("more arrivals"), std::string::npos);
  EXPECT_NE(error(Misuse::kNobodyArrives).find("deadlock"), std::string::npos);
  EXPECT_NE(error(Misuse::kNamedCount).find("different counts"), std::string::npos);
}

struct RegisterTask {
  bool give;
};

// 384 threads start with 168 registers each: one warpgroup takes 232 only when another gives.
void register_kernel(const RegisterTask task) {
  if (thread_index() >= 256) {
    take_registers<232>();
  } else if (task.give) {
    give_registers<40>();
  }
}

TEST(Sm90Registers, TakenOnlyWhenGiven) {
  EXPECT_EQ(error_of([] { run<register_kernel>(RegisterTask{true}, 384, 64); }), "no error");
  const std::string error = error_of([] { run<register_kernel>(RegisterTask{false}, 384, 64); });
  EXPECT_NE(error.find("deadlock"), std::string::npos) << error;
}

}  // namespace
}  // namespace fips::cuda
