// The MLP of kernels/shared_mlp.h as one persistent kernel, for decoding.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/shared_mlp.h"

namespace fips::cuda {

// Most tokens of one call.
inline constexpr int64_t kDecodeTokens = 16;

// Bytes of workspace for this call on the current device. The content may be anything, so it can be
// allocated anew for every call; a graph may replay the call on the same memory.
int64_t shared_mlp_decode_workspace_bytes(const SharedMlpParams& params);

// Every pointer is device memory of the current device, 1 to 16 tokens (0: nothing happens),
// float32, bfloat16 or float16; `workspace` is aligned to 16 bytes and not shared with a call that
// may run at the same time. One launch on `stream`, no allocation, no synchronisation: safe to
// capture in a graph. Sums are float32 in a fixed order; z, h and w are rounded to the element type
// once each (their gated halves are not), which is less often than a chain of products rounds.
// Indices are not validated: entries out of range are skipped, never followed. Throws for sizes,
// types or blocks that it cannot run.
void shared_mlp_decode(const SharedMlpParams& params, void* workspace, Stream stream);

}  // namespace fips::cuda
