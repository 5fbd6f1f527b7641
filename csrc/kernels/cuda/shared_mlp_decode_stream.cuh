// The stream of weights of shared_mlp_decode. Every warp has a ring of tile steps of its own in
// shared memory and walks its share of all four stages without regard to barriers: weights do not
// depend on earlier stages, so those of the next one are on their way while the warp still waits.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/shared_mlp_decode_task.h"

namespace fips::cuda {

// What a slot of the ring holds. `id` and `feature`: the stored block and the first input feature
// of each group of 16 positions; -1: none, read as zeros.
struct StepMeta {
  int segment;  // running number of (stage, tile, matrix); -1: the warp has no further step
  int stage;
  int step;  // along the segment's reduction
  int pad;
  int id[kDecodeMaxGroups];
  int feature[kDecodeMaxGroups];
};

struct WarpRing {
  unsigned char* tiles;  // [slots][kDecodeStepBytes]
  StepMeta* meta;        // [slots]
  int slots;

  FIPS_DEVICE_MEMBER unsigned char* tile(int slot) const { return tiles + slot * kDecodeStepBytes; }
  FIPS_DEVICE_MEMBER int next(int slot) const { return slot + 1 == slots ? 0 : slot + 1; }
};

// The warp's place in the stream.
struct StreamCursor {
  int stage, which, step;  // which: matrix of the stage
  int tile, tile_end;
  int segment, steps, dealt;  // dealt: steps of earlier segments of the thread block
  BlockRange range;           // of a slice: the segment's entries
};

template <class T>
FIPS_DEVICE void open_segment(const DecodeTask& task, StreamCursor& at) {
  const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
  int length = m.in_features;
  if (m.range != nullptr) {
    const int block = at.tile * kDecodeOut >> m.out_shift;
    at.range = clamp_range(m.range[block], m.range[block + 1], m.num_blocks, m.reduce_blocks);
    length = (at.range.end - at.range.begin) << m.reduce_shift;
  }
  at.dealt += at.steps;
  at.steps = (length + DecodeStep<T>::kReduce - 1) / DecodeStep<T>::kReduce;
  at.step = first_step(warp_index(), at.dealt);
  ++at.segment;
}

FIPS_DEVICE void enter_stage(const DecodeTask& task, StreamCursor& at) {
  const TileRange tiles = decode_tiles(tiles_of(task, at.stage), block_index(), task.blocks);
  at.tile = static_cast<int>(tiles.begin);
  at.tile_end = static_cast<int>(tiles.end);
  at.which = 0;
}

// From one matrix, tile or stage to the next that has any; false at the end of the stream.
template <class T>
FIPS_DEVICE bool next_segment(const DecodeTask& task, StreamCursor& at) {
  if (++at.which == matrices_of(task, at.stage)) {
    at.which = 0;
    ++at.tile;
  }
  while (at.tile >= at.tile_end) {
    if (++at.stage == kDecodeStages) {
      return false;
    }
    enter_stage(task, at);
  }
  open_segment<T>(task, at);
  return true;
}

// To the warp's next step, if the one at hand is not there.
template <class T>
FIPS_DEVICE void settle(const DecodeTask& task, StreamCursor& at) {
  while (at.stage < kDecodeStages && at.step >= at.steps) {
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

// Lane l: group l % kGroups of the step.
struct GroupRef {
  BlockRef block;
  int values_begin, values_end;  // `bitmap`: its packed values
};

template <class T>
FIPS_DEVICE GroupRef load_group(const DecodeTask& task, const StreamCursor& at) {
  GroupRef ref{{-1, -1}, 0, 0};
  if (at.stage == kDecodeStages) {
    return ref;
  }
  const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
  const int group = lane_index() % DecodeStep<T>::kGroups;
  const int position = at.step * DecodeStep<T>::kReduce + group * kDecodeGroup;
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
    if (m.mask != nullptr) {
      ref.values_begin = m.value_ptr[id];
      ref.values_end = m.value_ptr[id + 1];
    }
  }
  return ref;
}

// ---- copies to the ring
// --------------------------------------------------------------------------

struct TileSource {
  int64_t offset;  // in elements of the matrix
  int count;       // elements that exist
};

// 16 bytes of a dense matrix: outputs `out`... or one, positions `position`... or one.
FIPS_DEVICE TileSource dense_source(const DecodeMatrix& m, int out, int position, int chunk) {
  const int row = m.transposed ? position : out, column = m.transposed ? out : position;
  const int rows = m.transposed ? m.in_features : m.out_features;
  const int columns = m.transposed ? m.out_features : m.in_features;
  return {row * m.row_stride + column, row < rows ? elements_below(column, columns, chunk) : 0};
}

FIPS_DEVICE TileSource slice_source(const DecodeMatrix& m, int id, int out, int position,
                                    int chunk) {
  const int in_out = out & ((1 << m.out_shift) - 1);
  const int in_reduce = position & ((1 << m.reduce_shift) - 1);
  const int j = m.transposed ? in_reduce : in_out, k = m.transposed ? in_out : in_reduce;
  return {id * int64_t{m.slots} + (j << m.k_shift) + k, id < 0 ? 0 : chunk};
}

template <class T>
FIPS_DEVICE void copy_step(const DecodeMatrix& m, const StreamCursor& at, const GroupRef& ref,
                           unsigned char* tile) {
  using Step = DecodeStep<T>;
  const T* values = static_cast<const T*>(m.values);
  const int first_out = at.tile * kDecodeOut;
  const int first_position = at.step * Step::kReduce;
  FIPS_UNROLL
  for (int pass = 0; pass < kDecodeStepBytes / kChunkBytes / kWarpSize; ++pass) {
    const int item = pass * kWarpSize + lane_index();
    const int row_out = item / Step::kChunks, row_chunk = item % Step::kChunks;
    const int column = item / Step::kOutChunks, column_chunk = item % Step::kOutChunks;
    const int out = m.transposed ? column_chunk * Step::kChunk : row_out;
    const int position = m.transposed ? column : row_chunk * Step::kChunk;
    const int id =
        static_cast<int>(shuffle(static_cast<uint32_t>(ref.block.id), position / kDecodeGroup));
    const TileSource source =
        m.range == nullptr
            ? dense_source(m, first_out + out, first_position + position, Step::kChunk)
            : slice_source(m, id, first_out + out, first_position + position, Step::kChunk);
    const int offset = m.transposed ? column_tile_offset<Step::kOutChunks>(column, column_chunk)
                                    : row_tile_offset(row_out, row_chunk);
    stage_chunk(tile + offset, source.count > 0 ? values + source.offset : values, source.count,
                m.wide);
  }
}

// A `bitmap` step is expanded when it is used (shared_mlp_decode_bitmap.cuh); until then its mask
// and values come as far as L2. Where in the block its values lie is a guess from the mean density,
// which costs nothing when it is wrong.
template <class T>
FIPS_DEVICE void prefetch_bitmap_step(const DecodeMatrix& m, const StreamCursor& at,
                                      const GroupRef& ref) {
  constexpr int kLine = 128;
  const int lane = lane_index();
  const int group = lane % DecodeStep<T>::kGroups, worker = lane / DecodeStep<T>::kGroups;
  constexpr int kWorkers = kWarpSize / DecodeStep<T>::kGroups;
  if (ref.block.id < 0) {
    return;
  }
  const int position = at.step * DecodeStep<T>::kReduce + group * kDecodeGroup;
  const int first_row = m.transposed ? position & ((1 << m.reduce_shift) - 1)
                                     : at.tile * kDecodeOut & ((1 << m.out_shift) - 1);
  const int64_t first_slot = int64_t{first_row} << m.k_shift;
  const int64_t slots = int64_t{kDecodeGroup} << m.k_shift;
  const uint8_t* mask = m.mask + (ref.block.id * int64_t{m.slots} + first_slot) / 8;
  if (worker * kLine < slots / 8) {
    prefetch_l2(mask + worker * kLine);
  }
  const int64_t begin = max_of(0, ref.values_begin), end = min_of(m.num_values, ref.values_end);
  const int64_t stored = max_of(0, end - begin);
  const T* values = static_cast<const T*>(m.values) + begin;
  const int64_t first = stored * first_slot / m.slots * static_cast<int64_t>(sizeof(T));
  const int64_t last = stored * (first_slot + slots) / m.slots * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = first + worker * kLine; byte < last; byte += kWorkers * kLine) {
    prefetch_l2(reinterpret_cast<const unsigned char*>(values) + byte);
  }
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
  if (lane < DecodeStep<T>::kGroups) {
    meta.id[lane] = ref.block.id;
    meta.feature[lane] = ref.block.id < 0 ? -1 : ref.block.feature;
  }
  if (any) {
    const DecodeMatrix& m = task.matrix[matrix_of(at.stage, at.which)];
    if (m.mask == nullptr) {
      copy_step<T>(m, at, ref, ring.tile(slot));
    } else {
      prefetch_bitmap_step<T>(m, at, ref);
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
    case 3:
      return cp_async_wait<1>();
    case 4:
      return cp_async_wait<2>();
    case 6:
      return cp_async_wait<4>();
    case 8:
      return cp_async_wait<6>();
    default:
      return cp_async_wait<8>();
  }
}

}  // namespace fips::cuda
