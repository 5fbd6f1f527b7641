// Tasks of unequal work, dealt out to threads.
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "kernels/cpu/task_split.h"

namespace fips::testing {
namespace {

std::vector<int64_t> running(std::vector<int64_t> work) {
  work.insert(work.begin(), 0);
  std::partial_sum(work.begin(), work.end(), work.begin());
  return work;
}

TEST(TaskSplit, EveryTaskBelongsToOneThread) {
  std::mt19937 generator(1);
  for (int64_t edges : {1, 3, 12, 448}) {
    for (int64_t tokens : {1, 17, 197, 4096}) {
      for (int64_t threads : {1, 2, 7, 64}) {
        std::vector<int64_t> work(static_cast<size_t>(edges));
        for (int64_t& w : work) {
          w = 1 + generator() % 100;
        }
        const std::vector<int64_t> sums = running(work);
        const cpu::TaskSplit split(sums, tokens, 128, threads);
        EXPECT_EQ(split.first(0), 0);
        EXPECT_EQ(split.first(threads), split.tasks());
        for (int64_t thread = 0; thread < threads; ++thread) {
          EXPECT_LE(split.first(thread), split.first(thread + 1));
        }
      }
    }
  }
}

TEST(TaskSplit, UnequalEdgesAreSplitByTheirWork) {
  const std::vector<int64_t> work = running({60, 10, 10, 10, 10, 10, 10});
  const cpu::TaskSplit split(work, 100, 100, 2);
  EXPECT_EQ(split.first(1), 1);  // 60 on either side
  EXPECT_EQ(split.longest(), 60 * 108);
}

TEST(TaskSplit, GroupsAreCutWhereEdgesAreTooFewToShare) {
  // One edge: the tokens are all that two threads can share.
  EXPECT_EQ(cpu::choose_group(running({40}), 200, 512, 12, 2, false), 108);
  // Never fewer tokens than tiles are worth: many equal edges are shared.
  EXPECT_EQ(cpu::choose_group(running({40}), 100, 512, 12, 2, false), 108);
  EXPECT_EQ(cpu::choose_group(running(std::vector<int64_t>(48, 9)), 200, 512, 12, 16, true), 204);
  // A group for each thread where there are enough tokens.
  EXPECT_EQ(cpu::choose_group(running(std::vector<int64_t>(48, 9)), 240, 512, 12, 2, true), 120);
  EXPECT_EQ(cpu::choose_group(running(std::vector<int64_t>(48, 9)), 240, 512, 12, 2, false), 240);
}

}  // namespace
}  // namespace fips::testing
