// From the run-time description of a product to the kernel compiled for it.
#pragma once

#include "kernels/cuda/block_sparse_mm_sm90_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_sm90_launch.h"
#include "kernels/cuda/block_sparse_mm_sm90_resident_kernel.cuh"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {

template <class T>
class Sm90Launcher {
 public:
  Sm90Launcher(const Sm90Choice& choice, const Sm90Task& task, Stream stream)
      : choice_(choice), task_(task), stream_(stream) {}

  void run() const {
    if (choice_.plan.resident) {
      choice_.gated ? resident<true>() : resident<false>();
    } else {
      choice_.out_edge == 128 ? stream<128>() : stream<64>();
    }
  }

 private:
  template <int kOut>
  void stream() const {
    if (choice_.gated) {
      by_tile<kOut, false, true>();
    } else {
      choice_.transposed ? by_tile<kOut, true, false>() : by_tile<kOut, false, false>();
    }
  }

  template <int kOut, bool kTransposed, bool kGated>
  void by_tile() const {
    if (choice_.plan.tokens == kSm90LowTile) {
      start<Sm90Config<T, kOut, kSm90LowTile, kTransposed, kGated>>();
    } else {
      start<Sm90Config<T, kOut, sm90_tall_tile(kOut, kGated), kTransposed, kGated>>();
    }
  }

  template <class Config>
  void start() const {
    launch<block_sparse_mm_wgmma<Config>>(
        "block_sparse_mm", {task_.grid, kSm90Threads, Config::kSharedBytes}, task_, stream_);
  }

  template <bool kGated>
  void resident() const {
    switch (choice_.plan.tokens) {
      case 96:
        return start_resident<ResidentConfig<T, 96, kGated>>();
      case 128:
        return start_resident<ResidentConfig<T, 128, kGated>>();
      default:
        break;
    }
    if constexpr (!kGated) {
      choice_.plan.tokens == 192 ? start_resident<ResidentConfig<T, 192, false>>()
                                 : start_resident<ResidentConfig<T, 256, false>>();
    }
  }

  template <class Config>
  void start_resident() const {
    launch<block_sparse_mm_wgmma_resident<Config>>(
        "block_sparse_mm", {task_.grid, kSm90Threads, Config::kSharedBytes}, task_, stream_);
  }

  const Sm90Choice& choice_;
  const Sm90Task& task_;
  Stream stream_;
};

template <class T>
void launch_sm90(const Sm90Choice& choice, const Sm90Task& task, Stream stream) {
  Sm90Launcher<T>(choice, task, stream).run();
}

}  // namespace fips::cuda
