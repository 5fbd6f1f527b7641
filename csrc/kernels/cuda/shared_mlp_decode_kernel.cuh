// One persistent kernel for the four stages of an MLP on shared factors. At Llama-3-8B's sizes (U
// and V_i of density 1/4 in bfloat16: 78 MB) memory needs 16 us at 4.8 TB/s, and four separate
// launches would leave it idle between them. Here the rings of a multiprocessor have up to 128 KiB
// of weights under way (all slots but the one that is read), also across the barriers between
// stages: over 132 multiprocessors 3.6 us of memory time. By estimate, not yet measured, that is
// more than a barrier takes and several times the latency of memory. A ring of two slots, all that
// fits into 99 KiB of shared memory, has 32 KiB under way.
// Features go straight from L2 into registers, T / 32 (row steps) or T / 64 (column steps) of the
// bytes of the weights in blocks of these widths.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/grid_barrier.cuh"
#include "kernels/cuda/shared_mlp_decode_expand.cuh"
#include "kernels/cuda/shared_mlp_decode_multiply.cuh"

namespace fips::cuda {

// Dynamic shared memory: rings, their descriptions, sums, and per warp what the element type and
// the encoding need (at different times). All parts start on 16 bytes.
template <class T, int kTokens>
struct DecodeShared {
  static constexpr int kSlotBytes =
      kDecodeWarps * (kDecodeStepBytes + static_cast<int>(sizeof(StepMeta)));
  static constexpr int kFeatureBytes = sizeof(T) == 4 ? kFloatFeatureBytes<kTokens> : 0;
  static constexpr int kScanBytes = static_cast<int>(sizeof(MaskScan));

  FIPS_HOST_DEVICE static constexpr int scratch_bytes(bool bitmap) {
    return bitmap && kScanBytes > kFeatureBytes ? kScanBytes : kFeatureBytes;
  }

  static int bytes(int slots, bool bitmap) {
    return slots * kSlotBytes + DecodeSums<kTokens>::kBytes + kDecodeWarps * scratch_bytes(bitmap);
  }

  WarpRing ring;
  float* sums;
  unsigned char* scratch;  // of this warp

  FIPS_DEVICE_MEMBER DecodeShared(int slots, bool bitmap) {
    const int warp = warp_index();
    unsigned char* at = dynamic_shared_memory();
    ring.steps = at + warp * slots * kDecodeStepBytes;
    at += kDecodeWarps * slots * kDecodeStepBytes;
    ring.meta = reinterpret_cast<StepMeta*>(at) + warp * slots;
    at += kDecodeWarps * slots * static_cast<int>(sizeof(StepMeta));
    ring.slots = slots;
    sums = reinterpret_cast<float*>(at);
    scratch = at + DecodeSums<kTokens>::kBytes + warp * scratch_bytes(bitmap);
  }
};

// ---- what becomes of the sums
// --------------------------------------------------------------------

template <class T>
FIPS_DEVICE float vector_element(const void* vector, int i) {
  return vector == nullptr ? 0.0f : to_float(static_cast<const T*>(vector)[i]);
}

// Bias, activation, gate, identity part, one rounding.
template <class T>
FIPS_DEVICE T finish_output(const DecodeTask& task, int stage, float sum, float gate, int token,
                            int feature) {
  if (stage == kHiddenStage) {
    sum += vector_element<T>(task.up_bias, feature);
    if (task.gated) {
      sum *= activate<T>(task.activation, gate + vector_element<T>(task.gate_bias, feature));
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

// Calls body(index, token, out) for every sum of a unit.
template <class Body>
FIPS_DEVICE void each_output(const DecodeTask& task, int out_tile, const Body& body) {
  const int shift = log2_of_edge(out_tile);
  FIPS_UNROLL_BY(1)
  for (int i = thread_index(); i < task.tokens << shift; i += kDecodeThreads) {
    body(i, i >> shift, in_block(i, shift));
  }
}

FIPS_DEVICE uint64_t* share_flags(const DecodeTask& task, int stage) {
  return task.flags + (kDecodeBarriers + stage) * task.blocks;
}

// Sums of a share that is not its tile's first, for the block with the first.
template <int kTokens>
FIPS_DEVICE void publish_share(const DecodeTask& task, int stage, const DecodeSums<kTokens>& sums) {
  const int out_tile = task.split[stage].out_tile;
  float* target = task.partial + block_index() * task.partial_floats;
  FIPS_UNROLL_BY(1)
  for (int which = 0; which < matrices_of(task, stage); ++which) {
    each_output(task, out_tile, [&](int i, int token, int out) {
      target[which * task.tokens * out_tile + i] = sums.total(which, token, out);
    });
  }
  raise_flag(share_flags(task, stage), task.nonce);
}

// Adds the tile's other shares, in order, to sum `i` of this block's.
FIPS_DEVICE float with_shares(const DecodeTask& task, int stage, int which, int i, float sum) {
  const StageSplit& split = task.split[stage];
  const float* source = task.partial + (block_index() + 1) * task.partial_floats +
                        which * task.tokens * split.out_tile + i;
  FIPS_UNROLL_BY(2)
  for (int share = 1; share < split.shares; ++share, source += task.partial_floats) {
    sum += *source;
  }
  return sum;
}

// All threads; their sums are in shared memory. With shares, unit u is all the work of block u.
template <class T, int kTokens>
FIPS_DEVICE void finish_unit(const DecodeTask& task, int stage, int unit,
                             const DecodeSums<kTokens>& sums) {
  const StageSplit& split = task.split[stage];
  const int tile = tile_of_unit(task, stage, unit);
  if (unit != tile * split.shares) {
    return publish_share(task, stage, sums);
  }
  if (split.shares > 1) {
    wait_for_flags<kDecodeThreads>(share_flags(task, stage), task.nonce, unit + 1,
                                   split.shares - 1);
  }
  const DecodeFeatures& target = task.features[stage + 1];
  const int out_features = task.matrix[matrix_of(stage, 0)].out_features;
  each_output(task, split.out_tile, [&](int i, int token, int out) {
    const int feature = tile * split.out_tile + out;
    if (feature < out_features) {
      const float sum = with_shares(task, stage, 0, i, sums.total(0, token, out));
      const float gate = matrices_of(task, stage) == 1
                             ? 0.0f
                             : with_shares(task, stage, 1, i, sums.total(1, token, out));
      static_cast<T*>(target.data)[token * target.stride + feature] =
          finish_output<T>(task, stage, sum, gate, token, feature);
    }
  });
}

// The identity part of z.
template <class T>
FIPS_DEVICE void copy_identity(const DecodeTask& task) {
  const DecodeFeatures &x = task.features[0], &z = task.features[1];
  const int64_t count = int64_t{task.tokens} * task.width;
  FIPS_UNROLL_BY(1)
  for (int64_t i = block_index() * kDecodeThreads + thread_index(); i < count;
       i += int64_t{task.blocks} * kDecodeThreads) {
    const int64_t token = i / task.width, feature = i % task.width;
    static_cast<T*>(z.data)[token * z.stride + task.rank + feature] =
        static_cast<const T*>(x.data)[token * x.stride + feature];
  }
}

// ---- the kernel
// ----------------------------------------------------------------------------------

// One warp's way through its steps.
template <class T, int kTokens>
class DecodeWarp {
 public:
  FIPS_DEVICE_MEMBER explicit DecodeWarp(const DecodeTask& task)
      : task_(task), shared_(task.slots, task.bitmap), at_(open_stream<T>(task)) {
    ref_ = load_group<T>(task_, at_);
  }

  // Once the features of `stage` are there.
  FIPS_DEVICE_MEMBER void begin_stage(int stage) { load_next(stage, slot_); }

  FIPS_DEVICE_MEMBER DecodeSums<kTokens> sums(int stage) const {
    return {shared_.sums, task_.split[stage].out_tile + 4};
  }

  // Sums the warp's steps of the next segment and leaves the block's sums in shared memory. With
  // `fill`, the very first time, only starts as many steps as the ring holds: in the same loop,
  // since the code that starts a step is large.
  FIPS_DEVICE_MEMBER void sum_segment(int stage, int which, int unit, bool fill) {
    const DecodeMatrix& m = task_.matrix[matrix_of(stage, which)];
    const WarpRing& ring = shared_.ring;
    const int out_tile = task_.split[stage].out_tile;
    WarpSums<T, kTokens> total{};
    FIPS_UNROLL_BY(1)
    while (fill ? refill_ + 1 < ring.slots : ring.meta[slot_].segment == segment_) {
      if (!fill) {
        wait_for_step(ring.slots);
        warp_barrier();  // the step is here for all lanes, and all are done with the one before
      }
      issue_step<T>(task_, ring, refill_, at_, ref_);
      if (fill) {
        ++refill_;
        continue;
      }
      const StepFeatures<T, kTokens> x = next_;
      load_next(stage, ring.next(slot_));
      if (m.expands()) {
        const StepMeta& meta = ring.meta[slot_];
        const StepPlace place{tile_of_unit(task_, stage, unit) * out_tile, out_tile,
                              meta.step * DecodeStep<T>::reduce(m.columns)};
        expand_step<T>(m, meta, place, *reinterpret_cast<MaskScan*>(shared_.scratch),
                       ring.at(slot_));
      }
      total.add_step(m.columns, out_tile, ring.at(slot_), x, shared_.scratch);
      refill_ = slot_;
      slot_ = ring.next(slot_);
    }
    if (fill) {
      return;
    }
    ++segment_;
    sums(stage).collect(which, [&](const auto& store) { total.each(out_tile, store); });
  }

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

// Flags of a replay start as this run leaves them (grid_barrier.cuh). Nobody polls the shares of
// stage 0 or barrier 0 once barrier 1 is passed; the others are polled after barrier 0 only.
FIPS_DEVICE void clear_early_flags(const DecodeTask& task) {
  clear_flag(task.flags);
  clear_flag(share_flags(task, 0));
}
FIPS_DEVICE void clear_late_flags(const DecodeTask& task) {
  FIPS_UNROLL_BY(1)
  for (int row = 1; row < kDecodeFlagRows; ++row) {
    if (row != kDecodeBarriers) {  // the shares of stage 0
      clear_flag(task.flags + row * task.blocks);
    }
  }
}

template <class T, int kTokens>
FIPS_KERNEL(kDecodeThreads, 1)
shared_mlp_decode_kernel(const DecodeTask task) {
  clear_late_flags(task);
  DecodeWarp<T, kTokens> warp(task);
  FIPS_UNROLL_BY(1)
  for (int stage = 0; stage < kDecodeStages; ++stage) {
    if (stage > 0) {
      grid_barrier<kDecodeThreads>(task.flags + (stage - 1) * task.blocks, task.nonce, task.blocks);
    }
    if (stage == 2) {
      clear_early_flags(task);
    }
    const WorkRange units = units_of(task.split[stage], static_cast<int>(block_index()));
    FIPS_UNROLL_BY(1)
    for (int unit = units.begin - (stage == 0 ? 1 : 0); unit < units.end; ++unit) {
      const bool fill = unit < units.begin;
      if (unit == units.begin) {
        warp.begin_stage(stage);
      }
      FIPS_UNROLL_BY(1)
      for (int which = 0; which < (fill ? 1 : matrices_of(task, stage)); ++which) {
        warp.sum_segment(stage, which, unit, fill);
      }
      if (fill) {
        if (task.identity) {
          copy_identity<T>(task);
        }
        continue;
      }
      block_barrier();
      finish_unit<T, kTokens>(task, stage, unit, warp.sums(stage));
      block_barrier();  // before the next unit's sums
    }
  }
}

}  // namespace fips::cuda
