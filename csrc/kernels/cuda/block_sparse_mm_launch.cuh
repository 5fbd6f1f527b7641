// From the run-time description of a product to the kernel compiled for it.
#pragma once

#include "kernels/cuda/block_sparse_mm_ffma_kernel.cuh"
#include "kernels/cuda/block_sparse_mm_launch.h"
#include "kernels/cuda/block_sparse_mm_mma_kernel.cuh"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {

template <class T>
class MmLauncher {
 public:
  MmLauncher(const MmChoice& choice, const MmTask& task, Stream stream)
      : choice_(choice), task_(task), stream_(stream) {}

  void run() const {
    if (choice_.transposed) {
      choice_.bitmap ? by_tile<true, true>() : by_tile<true, false>();
    } else {
      choice_.bitmap ? by_tile<false, true>() : by_tile<false, false>();
    }
  }

 private:
  // Taller tiles exist only where largest_token_tile says so.
  template <bool kBitmap>
  static constexpr int kTallest = sizeof(T) == 2 && !kBitmap ? 128 : 64;

  template <bool kTransposed, bool kBitmap>
  void by_tile() const {
    if (choice_.token_tile <= 16) {
      by_edge<16, kTransposed, kBitmap>();
    } else if (choice_.token_tile <= 64) {
      by_edge<64, kTransposed, kBitmap>();
    } else {
      by_edge<kTallest<kBitmap>, kTransposed, kBitmap>();
    }
  }

  template <int kTokens, bool kTransposed, bool kBitmap>
  void by_edge() const {
    switch (choice_.out_edge) {
      case 16:
        return run<MmConfig<T, kTokens, 16, kTransposed, kBitmap>>();
      case 32:
        return run<MmConfig<T, kTokens, 32, kTransposed, kBitmap>>();
      case 64:
        return run<MmConfig<T, kTokens, 64, kTransposed, kBitmap>>();
      default:
        return run<MmConfig<T, kTokens, 128, kTransposed, kBitmap>>();
    }
  }

  template <class Config>
  void run() const {
    const int64_t blocks = ceil_div(task_.tokens, Config::kTokens) * task_.out_blocks;
    if (sizeof(T) == 2 || choice_.tf32) {
      launch<block_sparse_mm_mma<Config>>(
          kOp, {blocks, MmaWarps<Config>::kThreads, Config::kSharedBytes}, task_, stream_);
      return;
    }
    if constexpr (sizeof(T) == 4) {
      launch<block_sparse_mm_ffma<Config>>(
          kOp, {blocks, FfmaThreads<Config>::kThreads, Config::kSharedBytes}, task_, stream_);
    }
  }

  static constexpr const char* kOp = "block_sparse_mm";
  const MmChoice& choice_;
  const MmTask& task_;
  Stream stream_;
};

template <class T>
void launch_mm(const MmChoice& choice, const MmTask& task, Stream stream) {
  MmLauncher<T>(choice, task, stream).run();
}

}  // namespace fips::cuda
