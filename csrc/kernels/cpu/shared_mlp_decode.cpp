#include <cstring>

#include "kernels/block_sparse_mm.h"
#include "kernels/shared_mlp.h"
#include "kernels/skinny_mm.h"

namespace fips::cpu {
namespace {

// The four products, and where in the workspace their results lie.
struct Stages {
  SkinnyMmParams in;       // z = x U
  BlockSparseMmParams up;  // h = act(z V_up) or act(z V_gate) * (z V_up)
  MmEpilogue epilogue;
  BlockSparseMmParams down;  // w = h V_down^T
  SkinnyMmParams out;        // y = w_U U^T + bias + w_I
  int64_t z_at, h_at, w_at, work_at, bytes;
};

Stages plan(const SharedMlpParams& p, const Parallel& parallel) {
  const int64_t size = element_size(p.dtype);
  Stages s;
  s.in.dtype = p.dtype;
  s.in.matrix = p.base;
  s.in.rows = p.width;
  s.in.cols = p.rank;
  s.in.x = p.x;
  s.in.tokens = p.tokens;
  s.in.x_stride = p.x_stride;
  s.in.out_stride = p.up.rows;

  s.up.v = p.up;
  s.up.tokens = p.tokens;
  s.up.x_stride = p.up.rows;
  s.up.bias = p.up_bias;
  s.up.out_stride = p.hidden();
  s.epilogue.activation = p.activation;
  s.epilogue.gate = p.gate;
  s.epilogue.gate_bias = p.gate_bias;

  s.down.v = p.down;
  s.down.transpose = true;
  s.down.tokens = p.tokens;
  s.down.x_stride = p.hidden();
  s.down.out_stride = p.down.rows;

  s.out.dtype = p.dtype;
  s.out.matrix = p.base_out;
  s.out.rows = p.width;
  s.out.cols = p.rank_out;
  s.out.transpose = true;
  s.out.tokens = p.tokens;
  s.out.x_stride = p.down.rows;
  s.out.bias = p.down_bias;
  s.out.addend_stride = p.down.rows;
  s.out.out = p.y;
  s.out.out_stride = p.y_stride;

  s.bytes = 0;
  const auto part = [&](int64_t bytes) {
    const int64_t offset = s.bytes;
    s.bytes += round_up(bytes, 64);
    return offset;
  };
  s.z_at = part(p.tokens * p.up.rows * size);
  s.h_at = part(p.tokens * p.hidden() * size);
  s.w_at = part(p.tokens * p.down.rows * size);
  s.work_at = part(max_of(max_of(skinny_mm_workspace(s.in), skinny_mm_workspace(s.out)),
                          max_of(block_sparse_mm_workspace(s.up, s.epilogue, parallel),
                                 block_sparse_mm_workspace(s.down, {}, parallel))));
  return s;
}

}  // namespace

bool decodes_shared_mlp(const SharedMlpParams& p) {
  return p.tokens > 0 && p.tokens <= kFewTokens &&
         (p.gate == nullptr || (p.gate->bk == p.up.bk && p.gate->bn == p.up.bn &&
                                p.gate->is_bitmap() == p.up.is_bitmap()));
}

int64_t shared_mlp_decode_workspace(const SharedMlpParams& params, const Parallel& parallel) {
  return plan(params, parallel).bytes;
}

bool shared_mlp_decode(const SharedMlpParams& p, void* workspace, const Parallel& parallel) {
  Stages s = plan(p, parallel);
  const int64_t size = element_size(p.dtype);
  char* scratch = static_cast<char*>(workspace);
  char* work = scratch + s.work_at;
  s.in.out = scratch + s.z_at;
  s.up.x = scratch + s.z_at;
  s.up.out = scratch + s.h_at;
  s.down.x = scratch + s.h_at;
  s.down.out = scratch + s.w_at;
  s.out.x = scratch + s.w_at;
  s.out.addend = p.identity ? scratch + s.w_at + p.rank_out * size : nullptr;

  skinny_mm(s.in, work, parallel);
  for (int64_t t = 0; p.identity && t < p.tokens; ++t) {
    memcpy(scratch + s.z_at + (t * p.up.rows + p.rank) * size,
           static_cast<const char*>(p.x) + t * p.x_stride * size,
           static_cast<size_t>(p.width * size));
  }
  const bool sound = block_sparse_mm(s.up, s.epilogue, work, parallel) &&
                     block_sparse_mm(s.down, {}, work, parallel);
  skinny_mm(s.out, work, parallel);
  return sound;
}

}  // namespace fips::cpu
