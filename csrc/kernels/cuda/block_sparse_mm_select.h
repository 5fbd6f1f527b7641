// From the run-time description of a product to the kernel compiled for it. No CUDA here: the same
// selection drives the kernels' emulation in tests.
#pragma once

#include "core/check.h"
#include "core/types.h"

namespace fips::cuda {

struct MmChoice {
  bool transposed;
  bool bitmap;
  int out_edge;    // block edge along the outputs: 16, 32, 64 or 128
  int token_tile;  // 16, 64 or 128 (block_sparse_mm_heuristics.h)
};

// `Run` is a class template over a configuration, Config<T, tokens, out, transposed, bitmap>, with
// a static `launch(const Launch&)`.
template <template <class, int, int, bool, bool> class Config, template <class> class Run, class T>
class MmSelect {
 public:
  template <class Launch>
  static void launch(const MmChoice& choice, const Launch& launch) {
    if (choice.transposed) {
      choice.bitmap ? by_tile<true, true>(choice, launch) : by_tile<true, false>(choice, launch);
    } else {
      choice.bitmap ? by_tile<false, true>(choice, launch) : by_tile<false, false>(choice, launch);
    }
  }

 private:
  // Taller tiles exist only where largest_token_tile says so.
  template <bool kBitmap>
  static constexpr int kTallest = sizeof(T) == 2 && !kBitmap ? 128 : 64;

  template <bool kTransposed, bool kBitmap, class Launch>
  static void by_tile(const MmChoice& choice, const Launch& launch) {
    if (choice.token_tile <= 16) {
      by_edge<16, kTransposed, kBitmap>(choice, launch);
    } else if (choice.token_tile <= 64) {
      by_edge<64, kTransposed, kBitmap>(choice, launch);
    } else {
      by_edge<kTallest<kBitmap>, kTransposed, kBitmap>(choice, launch);
    }
  }

  template <int kTokens, bool kTransposed, bool kBitmap, class Launch>
  static void by_edge(const MmChoice& choice, const Launch& launch) {
    switch (choice.out_edge) {
      case 16:
        return Run<Config<T, kTokens, 16, kTransposed, kBitmap>>::launch(launch);
      case 32:
        return Run<Config<T, kTokens, 32, kTransposed, kBitmap>>::launch(launch);
      case 64:
        return Run<Config<T, kTokens, 64, kTransposed, kBitmap>>::launch(launch);
      case 128:
        return Run<Config<T, kTokens, 128, kTransposed, kBitmap>>::launch(launch);
      default:
        fail("block_sparse_mm: block edge ", choice.out_edge, "; it must be 16, 32, 64 or 128");
    }
  }
};

}  // namespace fips::cuda
