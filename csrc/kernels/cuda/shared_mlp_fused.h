// The whole MLP in one kernel for narrow models (d and r of a few hundred, as in the first stages
// of a Swin transformer): z, h and w never leave the chip, where the unfused chain is bound by
// their way through memory.
#pragma once

#include "kernels/cuda/device_info.h"
#include "kernels/cuda/stream.h"
#include "kernels/shared_mlp.h"

namespace fips::cuda {

// Whether shared_mlp_fused takes these arguments on a device: bfloat16 or float16, `block`
// encoding, no identity part, sizes that fit one multiprocessor, aligned memory.
bool fuses_shared_mlp(const SharedMlpParams& params, const DeviceInfo& device);

// Whether there are enough tokens: a tile of them is the work of one multiprocessor, and the
// chain's products spread few tiles better.
bool prefers_fused_mlp(const SharedMlpParams& params, const DeviceInfo& device);

// y for any number of tokens. z, h and w are rounded to the element type, sums are float32. Only
// launches on `stream`; index entries out of range are skipped.
void shared_mlp_fused(const SharedMlpParams& params, Stream stream);

}  // namespace fips::cuda
