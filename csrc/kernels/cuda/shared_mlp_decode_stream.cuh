// The stream of weights of shared_mlp_decode. Every warp has a ring of steps of its own in shared
// memory and walks its share of all four stages without regard to barriers: weights do not depend
// on earlier stages, so those of the next one are on their way while the warp still waits.
#pragma once

#include "kernels/cuda/shared_mlp_decode_copy.cuh"

namespace fips::cuda {

struct WarpRing {
  unsigned char* steps;  // [slots][kDecodeStepBytes]
  StepMeta* meta;        // [slots]
  int slots;

  FIPS_DEVICE_MEMBER unsigned char* at(int slot) const { return steps + slot * kDecodeStepBytes; }
  FIPS_DEVICE_MEMBER int next(int slot) const { return slot + 1 == slots ? 0 : slot + 1; }
};

// The warp's place in the stream.
struct StreamCursor {
  int stage, which, unit, unit_end;  // which: matrix of the stage
  int out;                           // first output of the unit
  int segment, dealt;                // dealt: steps of the thread block up to this segment's end
  int step, step_end;
  BlockRange range;  // of a slice: the tile's entries
};

FIPS_DEVICE int tile_of_unit(const DecodeTask& task, int stage, int unit) {
  const int shares = task.split[stage].shares;
  return shares == 1 ? unit : unit / shares;
}

template <class T>
FIPS_DEVICE void open_segment(const DecodeTask& task, StreamCursor& at) {
  const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
  const StageSplit& split = task.split[at.stage];
  const int tile = tile_of_unit(task, at.stage, at.unit);
  at.out = tile * split.out_tile;
  int length = m.in_features;
  if (m.range != nullptr) {
    const int block = at.out >> m.out_shift;
    at.range = clamp_range(m.range[block], m.range[block + 1], m.num_blocks, m.reduce_blocks);
    length = (at.range.end - at.range.begin) << m.reduce_shift;
  }
  const int reduce = DecodeStep<T>::reduce(m.columns);
  const int all = (length + reduce - 1) / reduce;
  const WorkRange steps = split.shares == 1
                              ? WorkRange{0, all}
                              : steps_of(all, at.unit - tile * split.shares, split.shares);
  at.step = steps.begin + first_step(warp_index(), at.dealt);
  at.step_end = steps.end;
  at.dealt += steps.end - steps.begin;
  ++at.segment;
}

FIPS_DEVICE void enter_stage(const DecodeTask& task, StreamCursor& at) {
  const WorkRange units = units_of(task.split[at.stage], static_cast<int>(block_index()));
  at.unit = units.begin;
  at.unit_end = units.end;
  at.which = 0;
}

// From one matrix, unit or stage to the next that there is; stage kDecodeStages is the end.
template <class T>
FIPS_DEVICE void next_segment(const DecodeTask& task, StreamCursor& at) {
  if (++at.which == matrices_of(task, at.stage)) {
    at.which = 0;
    ++at.unit;
  }
  while (at.unit >= at.unit_end) {
    if (++at.stage == kDecodeStages) {
      return;
    }
    enter_stage(task, at);
  }
  open_segment<T>(task, at);
}

// To the warp's next step, if the segment at hand has none left.
template <class T>
FIPS_DEVICE void settle(const DecodeTask& task, StreamCursor& at) {
  while (at.stage < kDecodeStages && at.step >= at.step_end) {
    next_segment<T>(task, at);
  }
}

template <class T>
FIPS_DEVICE StreamCursor open_stream(const DecodeTask& task) {
  StreamCursor at{};
  enter_stage(task, at);
  at.segment = at.which = -1;  // one before the first
  next_segment<T>(task, at);
  settle<T>(task, at);
  return at;
}

// ---- index entries, loaded one step before they are used
// -----------------------------------------

template <class T>
FIPS_DEVICE GroupRef load_group(const DecodeTask& task, const StreamCursor& at) {
  GroupRef ref{{-1, -1}, 0, 0};
  if (at.stage == kDecodeStages) {
    return ref;
  }
  const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
  const int reduce = DecodeStep<T>::reduce(m.columns);
  const int offset = lane_index() % kDecodeMaxGroups * kDecodeGroup;
  const int position = at.step * reduce + offset;
  if (offset >= reduce) {
    return ref;
  }
  if (m.range == nullptr) {
    ref.block = {0, position};
    return ref;
  }
  const int entry = at.range.begin + (position >> m.reduce_shift);
  if (entry >= at.range.end) {
    return ref;
  }
  const int id = m.block_id == nullptr ? entry : m.block_id[entry];
  ref.block = checked_ref(id, m.reduce_index[entry], m.num_blocks, m.reduce_blocks, m.reduce_shift);
  if (ref.block.id >= 0) {
    ref.block.feature += position & ((1 << m.reduce_shift) - 1);
    if (m.bitmap.mask != nullptr) {
      ref.values_begin = m.bitmap.value_ptr[id];
      ref.values_end = m.bitmap.value_ptr[id + 1];
    }
  }
  return ref;
}

// Starts the step at the cursor into `slot`, which all lanes have done reading, and moves on.
// Always one group of copies, empty at the end of the stream, so that groups count steps.
template <class T>
FIPS_DEVICE void issue_step(const DecodeTask& task, const WarpRing& ring, int slot,
                            StreamCursor& at, GroupRef& ref) {
  const bool any = at.stage < kDecodeStages;
  const int lane = lane_index();
  StepMeta& meta = ring.meta[slot];
  if (lane == 0) {
    meta.segment = any ? at.segment : -1;
    meta.stage = at.stage;
    meta.step = at.step;
  }
  if (lane < kDecodeMaxGroups) {
    meta.id[lane] = ref.block.id;
    meta.feature[lane] = ref.block.id < 0 ? -1 : ref.block.feature;
  }
  warp_barrier();  // the copies of all lanes read the description
  if (any) {
    const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
    const StepPlace place{at.out, task.split[at.stage].out_tile,
                          at.step * DecodeStep<T>::reduce(m.columns)};
    if (m.expands()) {
      if (m.bitmap.mask != nullptr) {
        copy_mask<T>(m, place, meta, ring.at(slot));
      }
      prefetch_values<T>(m, place, ref);
    } else if (m.columns) {
      copy_columns<T>(m, place, meta, ring.at(slot));
    } else {
      copy_rows<T>(m, place, meta, ring.at(slot));
    }
    at.step += kDecodeWarps;
    settle<T>(task, at);
    ref = load_group<T>(task, at);
  }
  cp_async_commit();
}

// Waits for the oldest step under way; slots - 1 have been started.
FIPS_DEVICE void wait_for_step(int slots) {
  switch (slots) {
    case 2:
      return cp_async_wait<0>();
    case 3:
      return cp_async_wait<1>();
    case 4:
      return cp_async_wait<2>();
    default:
      return cp_async_wait<3>();
  }
}

}  // namespace fips::cuda
