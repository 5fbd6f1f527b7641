// How kernels ask for threads without knowing whose threads they are: a plain callback.
#pragma once

#include <cstdint>

namespace fips {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);

  // Splits [0, tasks) into ranges of at least `grain` and calls `body` on each, possibly at once.
  void (*run)(int64_t tasks, int64_t grain, Body body, void* context);

  // How many ranges may run at once; kernels cut their work accordingly.
  int64_t (*threads)();
};

inline void run_serial(int64_t tasks, int64_t /*grain*/, Parallel::Body body, void* context) {
  if (tasks > 0) {
    body(context, 0, tasks);
  }
}

inline int64_t one_thread() { return 1; }

inline constexpr Parallel kSerial{run_serial, one_thread};

template <class F>
void parallel_for(const Parallel& parallel, int64_t tasks, int64_t grain, const F& body) {
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel.run(tasks, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fips
