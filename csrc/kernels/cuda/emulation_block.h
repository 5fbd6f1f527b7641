// Runs a grid of a CUDA kernel on the CPU, one thread block at a time, with its threads as fibres.
// A fibre runs until it needs others (a barrier, a warp instruction), so a test can run the warps
// in either order and must see the same result. Shared memory starts as NaNs, so that an element
// never written shows. The instructions themselves are in emulation.h.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "kernels/cuda/device_info.h"

namespace fips::cuda::emulation {

inline constexpr int kLanes = 32;

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  int bytes;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
  bool done = false;
};

// A meeting point of `size` threads; `generation` counts how often all have met.
struct Meeting {
  int size = 0, arrived = 0, generation = 0;
};

struct Warp {
  Meeting meeting;
  unsigned char slots[2][kLanes]
                     [64];  // two, so that a fast lane cannot overwrite what a slow one reads
};

// State of instructions that only some architectures have (emulation_sm90.h).
struct BlockExtension {
  virtual ~BlockExtension() = default;
  virtual void finish() {}  // all threads are done: throws if the block may not end like this
  virtual std::string explain_deadlock() const { return ""; }
};

class Block {
 public:
  Block(int threads, int shared_bytes, int64_t index, bool reverse)
      : index(index),
        fibres_(threads),
        warps_(threads / kLanes),
        shared_(allocate_shared(shared_bytes)),
        reverse_(reverse) {
    barrier_.size = threads;
    for (Warp& warp : warps_) {
      warp.meeting.size = kLanes;
    }
  }

  // `kernel` outlives the block.
  void start(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    for (Fibre& fibre : fibres_) {
      start(fibre);
    }
  }

  // Every thread as far as it gets without other blocks.
  struct Outcome {
    bool unfinished, progressed;
  };
  Outcome advance() {
    current() = this;
    const int64_t first = progress_;
    bool unfinished = true;
    try {
      for (int64_t before = -1; unfinished && before != progress_;) {
        before = progress_;
        unfinished = resume_all();
        if (unfinished && before == progress_ && perform_deferred()) {
          ++progress_;
        }
      }
      if (!unfinished) {
        finish();
      }
    } catch (...) {
      current() = nullptr;
      throw;
    }
    current() = nullptr;
    return {unfinished, progress_ != first};
  }

  void run(const std::function<void()>& kernel) {
    start(kernel);
    FIPS_CHECK(
        !advance().unfinished,
        "emulation: deadlock, the threads of a block wait for each other at different places",
        explain_deadlock());
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  unsigned char* shared() { return shared_.get(); }
  int threads() const { return static_cast<int>(fibres_.size()); }
  bool reverse() const { return reverse_; }

  void barrier() { any(false); }

  // A barrier; true when `value` is true in any thread.
  bool any(bool value) {
    const int side = barrier_.generation & 1;
    any_[side] |= value;
    if (barrier_.arrived + 1 == barrier_.size) {
      any_[1 - side] = false;  // all have read it: they are here
    }
    meet(barrier_);
    return any_[side];
  }

  void meet(Meeting& meeting) {
    ++progress_;
    const int generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    while (meeting.generation == generation) {
      yield();
    }
  }

  // Lets other threads run until `done()`.
  template <class Done>
  void wait_until(const Done& done) {
    while (!done()) {
      yield();
    }
    ++progress_;
  }

  // An operation that the hardware performs at a time of its own: here once every thread is stuck,
  // oldest first, or newest first when the warps run in reverse.
  void defer(std::function<void()> operation) { deferred_.push_back(std::move(operation)); }

  template <class Extension>
  Extension& extension() {
    if (extension_ == nullptr) {
      extension_ = std::make_unique<Extension>(*this);
    }
    return static_cast<Extension&>(*extension_);
  }

  // Every lane's `value`, once all lanes of the warp have brought theirs.
  template <class Value>
  std::array<Value, kLanes> exchange(const Value& value) {
    static_assert(sizeof(Value) <= 64, "one slot");
    Warp& warp = warps_[thread / kLanes];
    const int side = warp.meeting.generation & 1;
    memcpy(warp.slots[side][thread % kLanes], &value, sizeof value);
    meet(warp.meeting);
    std::array<Value, kLanes> values;
    for (int lane = 0; lane < kLanes; ++lane) {
      memcpy(&values[lane], warp.slots[side][lane], sizeof value);
    }
    return values;
  }

  std::string explain_deadlock() const {
    return extension_ == nullptr ? "" : extension_->explain_deadlock();
  }

  // Lets the other threads run, in this block and in others.
  void yield() { swapcontext(&fibre().context, &scheduler_); }

  Fibre& fibre() { return fibres_[thread]; }

  int thread = 0;
  int64_t index;

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  static constexpr size_t kSharedAlignment = 1024;  // what the widest swizzle asks for

  struct Free {
    void operator()(unsigned char* p) const { free(p); }
  };
  using SharedMemory = std::unique_ptr<unsigned char, Free>;

  // Ends where the kernel's request ends, so that AddressSanitizer sees every access past it.
  static SharedMemory allocate_shared(int bytes) {
    void* memory = nullptr;
    FIPS_CHECK(posix_memalign(&memory, kSharedAlignment, static_cast<size_t>(bytes)) == 0,
               "emulation: out of memory");
    memset(memory, 0xff, static_cast<size_t>(bytes));
    return SharedMemory(static_cast<unsigned char*>(memory));
  }

  static void enter() {
    Block* block = current();
    try {
      (*block->kernel_)();
    } catch (...) {
      block->failure_ = std::current_exception();
    }
    block->fibre().done = true;
    ++block->progress_;
    swapcontext(&block->fibre().context, &block->scheduler_);
  }

  void start(Fibre& fibre) {
    fibre.stack.reset(new unsigned char[kStackBytes]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Block::enter, 0);
  }

  // Lets the warps run in turn, each as far as it gets alone, so that a missing barrier shows: the
  // first one runs far ahead of the last. False when all threads are done.
  bool resume_all() {
    const int warps = static_cast<int>(warps_.size());
    bool unfinished = false;
    for (int i = 0; i < warps; ++i) {
      unfinished |= resume_warp(reverse_ ? warps - 1 - i : i);
    }
    return unfinished;
  }

  void finish() {
    FIPS_CHECK(deferred_.empty(), "emulation: a block ends with asynchronous copies under way");
    if (extension_ != nullptr) {
      extension_->finish();
    }
  }

  bool perform_deferred() {
    if (deferred_.empty()) {
      return false;
    }
    const auto which = reverse_ ? deferred_.end() - 1 : deferred_.begin();
    const std::function<void()> operation = std::move(*which);
    deferred_.erase(which);
    operation();
    return true;
  }

  bool resume_warp(int warp) {
    bool unfinished = true;
    for (int64_t before = -1; before != progress_;) {
      before = progress_;
      unfinished = false;
      for (int i = 0; i < kLanes; ++i) {
        thread = warp * kLanes + (reverse_ ? kLanes - 1 - i : i);
        if (!fibre().done) {
          unfinished = true;
          swapcontext(&scheduler_, &fibre().context);
          if (failure_ != nullptr) {
            std::rethrow_exception(failure_);
          }
        }
      }
    }
    return unfinished;
  }

  std::vector<Fibre> fibres_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  Meeting barrier_;
  bool any_[2] = {};  // by the parity of the barrier's generation
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::deque<std::function<void()>> deferred_;
  std::unique_ptr<BlockExtension> extension_;
  std::exception_ptr failure_;
  int64_t progress_ = 0;
  bool reverse_;
};

// The device that a test pretends to have, and the order in which its warps run.
struct Settings {
  DeviceInfo device{132, 80, 227 * 1024};
  bool reverse = false;
};
inline Settings& settings() {
  static Settings settings;
  return settings;
}
inline const DeviceInfo& device() { return settings().device; }

template <class Kernel, class Task>
void run_grid(Kernel* kernel, int64_t blocks, int threads, int shared_bytes, const Task& task) {
  FIPS_CHECK(shared_bytes <= device().max_shared_bytes, "emulation: ", shared_bytes,
             " bytes of shared memory, but a block has ", device().max_shared_bytes);
  for (int64_t index = 0; index < blocks; ++index) {
    Block block(threads, shared_bytes, index, settings().reverse);
    block.run([&] { kernel(task); });
  }
}

// For kernels whose blocks wait for each other: all blocks exist at once and run in turn, each as
// far as it gets, the first one ahead of all others (or with `reverse` the last one).
template <class Kernel, class Task>
void run_grid_together(Kernel* kernel, int64_t blocks, int threads, int shared_bytes,
                       const Task& task) {
  FIPS_CHECK(shared_bytes <= device().max_shared_bytes, "emulation: ", shared_bytes,
             " bytes of shared memory, but a block has ", device().max_shared_bytes);
  FIPS_CHECK(blocks <= device().sm_count, "emulation: ", blocks,
             " blocks that wait for each other, but the device runs ", device().sm_count,
             " at once");
  const std::function<void()> body = [&] { kernel(task); };
  std::vector<std::unique_ptr<Block>> grid;
  for (int64_t index = 0; index < blocks; ++index) {
    grid.push_back(std::make_unique<Block>(threads, shared_bytes, index, settings().reverse));
    grid.back()->start(body);
  }
  for (bool unfinished = true; unfinished;) {
    unfinished = false;
    bool progressed = false;
    for (int64_t i = 0; i < blocks; ++i) {
      const Block::Outcome outcome = grid[settings().reverse ? blocks - 1 - i : i]->advance();
      unfinished |= outcome.unfinished;
      progressed |= outcome.progressed;
    }
    FIPS_CHECK(!unfinished || progressed, "emulation: deadlock, blocks wait for each other");
  }
}

}  // namespace fips::cuda::emulation
