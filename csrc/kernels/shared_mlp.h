// The whole MLP on shared factors. Torch-free: raw pointers, sizes, strides.
//   z = x U, with `identity` [x U, x]
//   h = act(z V_up + b_up), or gated act(z V_gate + b_gate) * (z V_up + b_up)
//   w = h V_down^T
//   y = w U_out^T + b_down, with `identity` + the last `width` features of w
#pragma once

#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"
#include "kernels/activation.h"

namespace fips {

struct SharedMlpParams {
  DType dtype = DType::kFloat32;  // of every matrix, vector and slice
  int64_t width = 0;              // d

  const void* x = nullptr;  // [tokens, width], features contiguous
  int64_t tokens = 0;
  int64_t x_stride = 0;  // elements between tokens

  const void* base = nullptr;      // U [width, rank] contiguous
  const void* base_out = nullptr;  // U_out [width, rank_out] contiguous; may be `base`
  int64_t rank = 0, rank_out = 0;
  bool identity = false;

  BlockSparseView up;                     // [rank (+ width), n]
  const BlockSparseView* gate = nullptr;  // the same shape; its blocks may differ
  BlockSparseView down;                   // [rank_out (+ width), n]
  const void* up_bias = nullptr;          // [n]
  const void* gate_bias = nullptr;        // [n]
  const void* down_bias = nullptr;        // [width]
  Activation activation = Activation::kIdentity;

  void* y = nullptr;  // [tokens, width]
  int64_t y_stride = 0;

  int64_t hidden() const { return up.cols; }
};

namespace cpu {

// Decoding: y for a few tokens (kFewTokens in skinny_mm.h), where the time is that of reading the
// weights and nothing else may show.

// A gate must have the block edges and the encoding of `up`.
bool decodes_shared_mlp(const SharedMlpParams& params);

// Bytes of scratch memory (any content).
int64_t shared_mlp_decode_workspace(const SharedMlpParams& params, const Parallel& parallel);

// Safe for any index; false if entries out of range were skipped and y is meaningless.
bool shared_mlp_decode(const SharedMlpParams& params, void* workspace, const Parallel& parallel);

}  // namespace cpu
}  // namespace fips
