// How the tasks of mm_tiled are dealt out to threads. A task is (group of tokens, output edge),
// edges innermost; edges differ in how many blocks they store.
#pragma once

#include <cstdint>
#include <vector>

#include "core/math.h"

namespace fips::cpu {

// Ranges of tasks of nearly equal work.
class TaskSplit {
 public:
  // `work` is the running sum of the edges' work per token, one entry more than edges.
  TaskSplit(const std::vector<int64_t>& work, int64_t tokens, int64_t group, int64_t threads)
      : work_(work),
        edges_(static_cast<int64_t>(work.size()) - 1),
        tokens_(tokens),
        group_(group),
        threads_(threads) {}

  int64_t tasks() const { return ceil_div(tokens_, group_) * edges_; }

  // The first task of a thread; that of `threads` is past the last one.
  int64_t first(int64_t thread) const {
    const int64_t target = before(tasks()) / threads_ * thread;
    if (thread == threads_) {
      return tasks();
    }
    int64_t low = 0, high = tasks();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      before(middle) < target ? low = middle + 1 : high = middle;
    }
    return low > 0 && target - before(low - 1) < before(low) - target ? low - 1 : low;
  }

  // The work of the thread that has most.
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t thread = 0; thread < threads_; ++thread) {
      most = max_of(most, before(first(thread + 1)) - before(first(thread)));
    }
    return most;
  }

 private:
  // Making the weight tiles of a task takes as long as multiplying this many tokens by them.
  static constexpr int64_t kTileTokens = 8;

  // The work of the tasks before `task`.
  int64_t before(int64_t task) const {
    const int64_t all = work_.back(), g = task / edges_;
    const int64_t rows = max_of(0, min_of(group_, tokens_ - g * group_));
    const int64_t earlier = min_of(g * group_, tokens_) + g * kTileTokens;
    return earlier * all + (rows + kTileTokens) * work_[task % edges_];
  }

  const std::vector<int64_t>& work_;
  int64_t edges_, tokens_, group_, threads_;
};

// Tokens per task, a multiple of `rows`: up to `most`, because tiles are made once per task, but
// cut where that evens out the threads' work. With `own_panels` and enough tokens, every thread has
// a group or more, and multiplies what it has packed itself: wide rows of x are slow to fetch from
// another core's cache.
inline int64_t choose_group(const std::vector<int64_t>& work, int64_t tokens, int64_t most,
                            int64_t rows, int64_t threads, bool own_panels) {
  constexpr int64_t kFewest = 64;
  int64_t best = 0, shortest = 0, groups = ceil_div(tokens, most);
  if (own_panels && tokens / round_up(groups, threads) >= kFewest) {
    groups = round_up(groups, threads);
  }
  for (const int64_t limit = 4 * groups; groups <= limit; ++groups) {
    const int64_t group = round_up(ceil_div(tokens, groups), rows);
    const int64_t longest = TaskSplit(work, tokens, group, threads).longest();
    if (best == 0 || longest < shortest) {
      best = group;
      shortest = longest;
    }
    if (tokens / (groups + 1) < kFewest) {
      break;
    }
  }
  return best;
}

}  // namespace fips::cpu
