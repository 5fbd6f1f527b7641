// One persistent kernel for the four stages of an MLP on shared factors. At Llama-3-8B's sizes (U
// and V_i of density 1/4 in bfloat16: 78 MB) memory needs 16 us at 4.8 TB/s, and four separate
// launches would leave it idle between them. Here the rings of a multiprocessor hold up to 160 KiB
// of weights under way, also across the barriers between stages; together that is 4 us of memory
// time, more than a barrier takes, and what several times the latency asks for.
// Features go straight from L2 into registers: T / 16 of the bytes of the weights.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/grid_barrier.cuh"
#include "kernels/cuda/shared_mlp_decode_bitmap.cuh"
#include "kernels/cuda/shared_mlp_decode_multiply.cuh"

namespace fips::cuda {

// Dynamic shared memory: rings, their descriptions, sums, and per warp what the element type or the
// encoding need. All parts start on 16 bytes.
template <class T, int kTokens>
struct DecodeShared {
  static constexpr int kSlotBytes =
      kDecodeWarps * (kDecodeStepBytes + static_cast<int>(sizeof(StepMeta)));
  static constexpr int kFloatBytes =
      sizeof(T) == 4 ? kDecodeWarps * static_cast<int>(sizeof(FloatFeatures<kTokens>)) : 0;
  static constexpr int kScanBytes = kDecodeWarps * static_cast<int>(sizeof(MaskScan<T>));

  static int bytes(int slots, bool bitmap) {
    return slots * kSlotBytes + DecodeSums<kTokens>::kBytes + kFloatBytes +
           (bitmap ? kScanBytes : 0);
  }

  WarpRing ring;
  DecodeSums<kTokens> sums;
  unsigned char* features;  // of this warp
  MaskScan<T>* scan;        // of this warp

  FIPS_DEVICE_MEMBER explicit DecodeShared(int slots) {
    const int warp = warp_index();
    unsigned char* at = dynamic_shared_memory();
    ring.tiles = at + warp * slots * kDecodeStepBytes;
    at += kDecodeWarps * slots * kDecodeStepBytes;
    ring.meta = reinterpret_cast<StepMeta*>(at) + warp * slots;
    at += kDecodeWarps * slots * static_cast<int>(sizeof(StepMeta));
    ring.slots = slots;
    sums.shared = reinterpret_cast<float*>(at);
    at += DecodeSums<kTokens>::kBytes;
    features = at + warp * (kFloatBytes / kDecodeWarps);
    at += kFloatBytes;
    scan = reinterpret_cast<MaskScan<T>*>(at) + warp;
  }
};

template <class T>
FIPS_DEVICE float vector_element(const void* vector, int i) {
  return vector == nullptr ? 0.0f : to_float(static_cast<const T*>(vector)[i]);
}

// What becomes of one sum of a stage: bias, activation, gate, identity, one rounding.
template <class T, int kTokens>
FIPS_DEVICE T finish_output(const DecodeTask& task, int stage, const DecodeSums<kTokens>& sums,
                            int token, int out, int feature) {
  float sum = sums.total(0, token, out);
  if (stage == kHiddenStage) {
    sum += vector_element<T>(task.up_bias, feature);
    if (task.gated) {
      const float gate = sums.total(1, token, out) + vector_element<T>(task.gate_bias, feature);
      sum *= activate<T>(task.activation, gate);
    } else {
      sum = activate<T>(task.activation, sum);
    }
  } else if (stage == kDecodeStages - 1) {
    sum += vector_element<T>(task.down_bias, feature);
    if (task.identity) {
      const DecodeFeatures& w = task.features[stage];
      sum += to_float(static_cast<const T*>(w.data)[token * w.stride + task.rank_out + feature]);
    }
  }
  return from_float<T>(sum);
}

template <class T, int kTokens>
FIPS_DEVICE void finish_tile(const DecodeTask& task, int stage, int tile,
                             const DecodeSums<kTokens>& sums) {
  const int token = thread_index() / kDecodeOut, out = thread_index() % kDecodeOut;
  const int feature = tile * kDecodeOut + out;
  if (token < task.tokens && feature < task.matrix[matrix_of(stage, 0)].out_features) {
    const DecodeFeatures& target = task.features[stage + 1];
    static_cast<T*>(target.data)[token * target.stride + feature] =
        finish_output<T, kTokens>(task, stage, sums, token, out, feature);
  }
}

// The identity part of z.
template <class T>
FIPS_DEVICE void copy_identity(const DecodeTask& task) {
  const DecodeFeatures &x = task.features[0], &z = task.features[1];
  const int64_t count = int64_t{task.tokens} * task.width;
  for (int64_t i = block_index() * kDecodeThreads + thread_index(); i < count;
       i += int64_t{task.blocks} * kDecodeThreads) {
    const int64_t token = i / task.width, feature = i % task.width;
    static_cast<T*>(z.data)[token * z.stride + task.rank + feature] =
        static_cast<const T*>(x.data)[token * x.stride + feature];
  }
}

// One warp's way through its steps.
template <class T, int kTokens>
class DecodeWarp {
 public:
  FIPS_DEVICE_MEMBER explicit DecodeWarp(const DecodeTask& task)
      : task_(task), shared_(task.slots), at_(open_stream<T>(task)) {
    ref_ = load_group<T>(task_, at_);
    for (int slot = 0; slot + 1 < shared_.ring.slots; ++slot) {
      issue_step<T>(task_, shared_.ring, slot, at_, ref_);
    }
    refill_ = shared_.ring.slots - 1;
    warp_barrier();
  }

  // Once the features of `stage` are there.
  FIPS_DEVICE_MEMBER void begin_stage(int stage) { load_next(stage, slot_); }

  // Sums the warp's steps of the next segment.
  FIPS_DEVICE_MEMBER void sum_segment(int stage, int which, int tile) {
    const DecodeMatrix& m = task_.matrix[matrix_of(stage, which)];
    const WarpRing& ring = shared_.ring;
    WarpSums<T, kTokens> sums{};
    while (ring.meta[slot_].segment == segment_) {
      wait_for_step(ring.slots);
      warp_barrier();  // the step is here for all lanes, and all are done with the one before
      issue_step<T>(task_, ring, refill_, at_, ref_);
      if (m.mask != nullptr) {
        expand_step<T>(m, ring.meta[slot_], tile, *shared_.scan, ring.tile(slot_));
      }
      const StepFeatures<T, kTokens> x = next_;
      load_next(stage, ring.next(slot_));
      sums.add_step(m, ring.tile(slot_), x, shared_.features);
      refill_ = slot_;
      slot_ = ring.next(slot_);
    }
    sums.store(shared_.sums, which);
    ++segment_;
  }

  FIPS_DEVICE_MEMBER const DecodeSums<kTokens>& sums() const { return shared_.sums; }

 private:
  FIPS_DEVICE_MEMBER void load_next(int stage, int slot) {
    const StepMeta& meta = shared_.ring.meta[slot];
    if (meta.segment >= 0 && meta.stage == stage) {
      load_features<T, kTokens>(task_, meta, next_);
    }
  }

  const DecodeTask& task_;
  DecodeShared<T, kTokens> shared_;
  StreamCursor at_;                  // of the next step to start
  GroupRef ref_;                     // its index entries
  StepFeatures<T, kTokens> next_{};  // of the step in slot_
  int slot_ = 0, refill_ = 0, segment_ = 0;
};

template <class T, int kTokens>
FIPS_KERNEL(kDecodeThreads, 1)
shared_mlp_decode_kernel(const DecodeTask task) {
  for (int barrier = 1; barrier < kDecodeBarriers; ++barrier) {
    clear_flag(task.flags + barrier * task.blocks);
  }
  DecodeWarp<T, kTokens> warp(task);
  if (task.identity) {
    copy_identity<T>(task);
  }
  FIPS_UNROLL_BY(1)
  for (int stage = 0; stage < kDecodeStages; ++stage) {
    if (stage > 0) {
      grid_barrier<kDecodeThreads>(task.flags + (stage - 1) * task.blocks, task.nonce, task.blocks);
    }
    if (stage == 2) {
      clear_flag(task.flags);
    }
    warp.begin_stage(stage);
    const TileRange tiles = decode_tiles(tiles_of(task, stage), block_index(), task.blocks);
    FIPS_UNROLL_BY(1)
    for (int tile = static_cast<int>(tiles.begin); tile < tiles.end; ++tile) {
      FIPS_UNROLL_BY(1)
      for (int which = 0; which < matrices_of(task, stage); ++which) {
        warp.sum_segment(stage, which, tile);
      }
      block_barrier();
      finish_tile<T, kTokens>(task, stage, tile, warp.sums());
      block_barrier();  // before the next tile's sums
    }
  }
}

}  // namespace fips::cuda
