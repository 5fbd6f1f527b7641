// The index maps of the decoding kernel, and the emulation of blocks that wait for each other.
#include <gtest/gtest.h>

#include <cstdlib>
#include <set>
#include <vector>

#include "kernels/cuda/emulation.h"
#include "kernels/cuda/shared_mlp_decode_layout.h"

namespace fips::cuda {
namespace {

TEST(CudaDecodeLayout, UnitsOfAllBlocksCoverTheStageEvenly) {
  for (const int outputs : {0, 5, 64, 384, 2048, 2112, 14336, 100000}) {
    for (const int blocks : {1, 3, 132}) {
      const StageSplit split = choose_split(outputs, 32, 100, blocks);
      int end = 0;
      for (int block = 0; block < blocks; ++block) {
        const WorkRange range = units_of(split, block);
        EXPECT_EQ(range.begin, end);
        if (split.units <= blocks && range.begin < range.end) {
          EXPECT_EQ(range.begin, block) << "shares find each other by their block";
        }
        end = range.end;
        EXPECT_LE(std::abs((range.end - range.begin) * blocks - split.units), blocks);
      }
      EXPECT_EQ(end, split.units);
    }
  }
}

TEST(CudaDecodeLayout, SharesCoverTheReduction) {
  for (const int steps : {0, 1, 7, 100}) {
    for (const int shares : {1, 3, 8}) {
      int end = 0;
      for (int share = 0; share < shares; ++share) {
        const WorkRange range = steps_of(steps, share, shares);
        EXPECT_EQ(range.begin, end);
        end = range.end;
      }
      EXPECT_EQ(end, steps);
    }
  }
}

TEST(CudaDecodeLayout, SplitsFillTheDeviceButNeverShareABlock) {
  for (const int64_t outputs : {0, 5, 64, 384, 1152, 2048, 4096, 14336, 28672}) {
    for (const int widest : {16, 32, 64}) {
      for (const int64_t steps : {0, 8, 64, 500}) {
        for (const int64_t blocks : {1, 3, 132}) {
          const StageSplit split = choose_split(outputs, widest, steps, blocks);
          EXPECT_LE(split.out_tile, widest);
          EXPECT_GE(split.out_tile, 16);
          EXPECT_EQ(split.units, ceil_div(outputs, split.out_tile) * split.shares);
          EXPECT_TRUE(split.shares == 1 || split.units <= blocks);
          EXPECT_TRUE(split.shares == 1 || split.shares * kDecodeWarps <= steps);
        }
      }
    }
  }
  // Llama-3-8B on 132 multiprocessors: z = x U, w = h V^T and y = w U^T on nearly all of them.
  EXPECT_EQ(choose_split(2048, 64, 128, 132).units, 128);
  EXPECT_EQ(choose_split(2048, 64, 112, 132).units, 128);
  EXPECT_EQ(choose_split(4096, 32, 32, 132).units, 128);
}

TEST(CudaDecodeLayout, WarpsTakeStepsInTurn) {
  int before = 0;
  std::vector<int> order;
  for (const int steps : {3, 0, 20, 8, 1, 7}) {
    std::vector<int> owner(steps, -1);
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      for (int step = first_step(warp, before); step < steps; step += kDecodeWarps) {
        EXPECT_EQ(owner[step], -1);
        owner[step] = warp;
      }
    }
    order.insert(order.end(), owner.begin(), owner.end());
    before += steps;
  }
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(order[i], static_cast<int>(i % kDecodeWarps));
  }
}

template <class Offset>
void expect_bijection(int rows, int chunks, const Offset& offset) {
  std::set<int> offsets;
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      EXPECT_EQ(offset(row, chunk) % kChunkBytes, 0);
      EXPECT_LT(offset(row, chunk), rows * chunks * kChunkBytes);
      offsets.insert(offset(row, chunk));
    }
  }
  EXPECT_EQ(offsets.size(), size_t(rows) * chunks) << "two chunks share a place";
}

// Eight 16-byte accesses touch every bank once.
void expect_no_conflict(const std::vector<int>& offsets) {
  std::set<int> groups;
  for (const int offset : offsets) {
    groups.insert(offset / kChunkBytes % 8);
  }
  EXPECT_EQ(groups.size(), 8u);
}

TEST(CudaDecodeLayout, StepsAreBijections) {
  expect_bijection(kRowStepOut, 8, [](int out, int chunk) { return row_step_offset(out, chunk); });
  for (const int shift : {1, 2, 3}) {
    expect_bijection(kColumnStepReduce, 1 << shift, [&](int position, int chunk) {
      return column_step_offset(position, chunk, shift);
    });
  }
}

TEST(CudaDecodeLayout, ReadsHaveNoBankConflicts) {
  for (int first = 0; first < 32; first += 8) {  // eight lanes at a time
    std::vector<int> offsets;
    for (const int span : {0, 1}) {  // 16-bit elements
      offsets.clear();
      for (int lane = first; lane < first + 8; ++lane) {
        offsets.push_back(row_step_offset(lane / 4, span * 4 + lane % 4));
      }
      expect_no_conflict(offsets);
    }
    for (const int m : {0, 1}) {
      for (const int shift : {1, 2, 3}) {
        for (int out = 0; out < 1 << shift; out += 2) {
          offsets.clear();
          for (int lane = first; lane < first + 8; ++lane) {
            const Coord at = column_step_row(lane, m);
            offsets.push_back(column_step_offset(at.row, out + at.col, shift));
          }
          expect_no_conflict(offsets);
        }
      }
    }
    for (int chunk = 0; chunk < 8; ++chunk) {  // float32: eight outputs at one chunk
      offsets.clear();
      for (int out = first; out < first + 8; ++out) {
        offsets.push_back(row_step_offset(out, chunk));
      }
      expect_no_conflict(offsets);
    }
  }
}

// Register r of lane 4 g + q after the transposing ldmatrix.x4: rows 2 q and 2 q + 1 of matrix r at
// its column g. For instruction m it must hold output g (+ 8 for odd r) at the positions of words
// 2 m (r < 2) and 2 m + 1 of the lane's 8.
TEST(CudaDecodeLayout, TransposedFragmentsMatchTheFeatures) {
  for (int m = 0; m < 2; ++m) {
    for (int q = 0; q < 4; ++q) {
      for (int r = 0; r < 4; ++r) {
        for (int half = 0; half < 2; ++half) {
          const Coord at = column_step_row(r * 8 + 2 * q + half, m);
          EXPECT_EQ(at.row, 8 * q + 2 * (2 * m + r / 2) + half);
          EXPECT_EQ(at.col, r % 2);
        }
      }
    }
  }
}

// ---- the emulated grid
// ---------------------------------------------------------------------------

struct WaitTask {
  uint64_t* flag;
  bool raise;
};

void wait_for_the_last_block(const WaitTask task) {
  if (block_index() == 2 && task.raise) {
    store_release(task.flag, 1);
  }
  while (load_acquire(task.flag) == 0) {
    spin();
  }
}

TEST(CudaEmulation, BlocksThatWaitForEachOther) {
  for (const bool reverse : {false, true}) {
    emulation::settings() = {{3, 80, 1024}, reverse};
    uint64_t flag = 0;
    emulation::run_grid_together(wait_for_the_last_block, 3, 32, 16, WaitTask{&flag, true});
    flag = 0;
    EXPECT_THROW(
        emulation::run_grid_together(wait_for_the_last_block, 3, 32, 16, WaitTask{&flag, false}),
        Error);
    EXPECT_THROW(
        emulation::run_grid_together(wait_for_the_last_block, 4, 32, 16, WaitTask{&flag, true}),
        Error);
  }
  emulation::settings() = {};
}

}  // namespace
}  // namespace fips::cuda
