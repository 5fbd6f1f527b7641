// Copies one step of weights from global to shared memory, one warp. Weights past the edge of a
// dense matrix and stored blocks that do not exist are zeros.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/shared_mlp_decode_task.h"

namespace fips::cuda {

struct StepPlace {
  int out, out_tile;  // first output and how many
  int position;       // first position of the reduction
};

// What a slot of a warp's ring holds. `id` and `feature`: the stored block (a dense matrix has
// block 0 only) and the first input feature of each group of 16 positions; -1: none, read as zeros.
struct alignas(kChunkBytes) StepMeta {
  int segment;  // running number of (stage, unit, matrix); -1: the warp has no further step
  int stage;
  int step;  // along the reduction
  int unused;
  int id[kDecodeMaxGroups];
  int feature[kDecodeMaxGroups];
};

// Index entries of a step; lane l: group l % 4.
struct GroupRef {
  BlockRef block;                // -1: none
  int values_begin, values_end;  // `bitmap`: its packed values
};

FIPS_DEVICE int in_block(int index, int shift) { return index & ((1 << shift) - 1); }

// Calls copy(pass) for each of `passes`; unrolled where copies are asynchronous, since only their
// addresses take registers.
template <int kMost, class Copy>
FIPS_DEVICE void each_pass(int passes, bool wide, const Copy& copy) {
  if (wide) {
    FIPS_UNROLL
    for (int pass = 0; pass < kMost; ++pass) {
      if (pass < passes) {
        copy(pass, true);
      }
    }
  } else {
    FIPS_UNROLL_BY(1)
    for (int pass = 0; pass < passes; ++pass) {
      copy(pass, false);
    }
  }
}

// Row step: eight lanes to a row, so a lane stays at one chunk of positions.
template <class T>
FIPS_DEVICE void copy_rows(const DecodeMatrix& m, const StepPlace& place, const StepMeta& meta,
                           unsigned char* step) {
  constexpr int kChunk = DecodeStep<T>::kChunk, kRows = kWarpSize / 8;
  const int chunk = lane_index() % 8, first = lane_index() / 8;
  const int position = place.position + chunk * kChunk;
  const T* values = static_cast<const T*>(m.values);
  const T* source = values;
  int stride = m.row_stride, count = kChunk, rows = kRowStepOut;
  if (m.range == nullptr) {
    source += (place.out + first) * int64_t{stride} + position;
    count = elements_below(position, m.in_features, kChunk);
    rows = m.out_features - place.out;
  } else {
    const int id = meta.id[chunk / DecodeStep<T>::kGroupChunks];
    const int j = in_block(place.out, m.out_shift) + first;
    source += id * int64_t{m.slots} + (j << m.k_shift) + in_block(position, m.reduce_shift);
    stride = 1 << m.k_shift;
    count = id < 0 ? 0 : kChunk;
  }
  each_pass<kRowStepOut / kRows>(place.out_tile / kRows, m.wide, [&](int pass, bool wide) {
    const int row = pass * kRows + first;
    const int valid = row < rows ? count : 0;
    stage_chunk(step + row_step_offset(row, chunk),
                valid > 0 ? source + pass * kRows * int64_t{stride} : values, valid, wide);
  });
}

// log2 of the chunks in a row of a column step.
template <class T>
FIPS_DEVICE int column_chunks_shift(int out_tile) {
  const int chunks = out_tile / DecodeStep<T>::kChunk;
  return chunks == 2 ? 1 : chunks == 4 ? 2 : 3;
}

// Column step: two, four or eight lanes to a row, so a lane stays at one chunk of outputs. Its two
// groups of 16 positions may lie in different blocks.
template <class T>
FIPS_DEVICE void copy_columns(const DecodeMatrix& m, const StepPlace& place, const StepMeta& meta,
                              unsigned char* step) {
  constexpr int kChunk = DecodeStep<T>::kChunk, kGroups = kColumnStepReduce / kDecodeGroup;
  const int shift = column_chunks_shift<T>(place.out_tile), chunks = 1 << shift;
  const int chunk = lane_index() & (chunks - 1), first = lane_index() >> shift;
  const int out = place.out + chunk * kChunk;
  const T* values = static_cast<const T*>(m.values);
  const T* source[kGroups];
  int count[kGroups], stride = m.row_stride, rows = kColumnStepReduce;
  FIPS_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    const int position = place.position + group * kDecodeGroup;
    if (m.range == nullptr) {
      source[group] = values + position * int64_t{stride} + out;
      count[group] = elements_below(out, m.out_features, kChunk);
    } else {
      const int id = meta.id[group], j = in_block(position, m.reduce_shift);
      source[group] =
          values + id * int64_t{m.slots} + (j << m.k_shift) + in_block(out, m.out_shift);
      count[group] = id < 0 ? 0 : kChunk;
    }
  }
  if (m.range == nullptr) {
    rows = m.in_features - place.position;
  } else {
    stride = 1 << m.k_shift;
  }
  each_pass<8>(chunks, m.wide, [&](int pass, bool wide) {
    const int row = pass * (kWarpSize >> shift) + first;
    const bool second = row >= kDecodeGroup;
    const int valid = row < rows ? second ? count[1] : count[0] : 0;
    const T* from = (second ? source[1] : source[0]) + row % kDecodeGroup * int64_t{stride};
    stage_chunk(step + column_step_offset(row, chunk, shift), valid > 0 ? from : values, valid,
                wide);
  });
}

// ---- `bitmap` encoding, and codes
// ----------------------------------------------------------------
//
// A step is expanded when it is used (shared_mlp_decode_expand.cuh). Until then its slot holds the
// masks, if there are any, from each stored block's first word on, since a value is found by
// counting the ones before it.

// Positions of a step that lie in one stored block, and where its mask is kept in the slot.
struct BitmapParts {
  int count, positions, mask_stride;
};

template <class T>
FIPS_DEVICE BitmapParts bitmap_parts(const DecodeMatrix& m) {
  const int reduce = DecodeStep<T>::reduce(m.columns), edge = 1 << m.reduce_shift;
  const int positions = edge < reduce ? edge : reduce, count = reduce / positions;
  return {count, positions, kDecodeStepBytes / count};
}

// Slots of a stored block that a step reads, as a range of whole rows.
struct SlotRange {
  int begin, end;
};

FIPS_DEVICE SlotRange part_slots(const DecodeMatrix& m, const StepPlace& place, int position,
                                 int positions) {
  const int row = m.columns ? in_block(position, m.reduce_shift) : in_block(place.out, m.out_shift);
  const int rows = m.columns ? positions : place.out_tile;
  return {row << m.k_shift, (row + rows) << m.k_shift};
}

template <class T>
FIPS_DEVICE void copy_mask(const DecodeMatrix& m, const StepPlace& place, const StepMeta& meta,
                           unsigned char* step) {
  const BitmapParts parts = bitmap_parts<T>(m);
  FIPS_UNROLL_BY(1)
  for (int part = 0; part < parts.count; ++part) {
    const int offset = part * parts.positions;
    const int id = meta.id[offset / kDecodeGroup];
    const SlotRange slots = part_slots(m, place, place.position + offset, parts.positions);
    const uint8_t* mask = m.bitmap.mask + id * int64_t{m.slots / 8};
    FIPS_UNROLL_BY(1)
    for (int byte = lane_index() * kChunkBytes; id >= 0 && byte < slots.end / 8;
         byte += kWarpSize * kChunkBytes) {
      stage_chunk(step + part * parts.mask_stride + byte, mask + byte, kChunkBytes, m.wide_mask);
    }
  }
}

template <class T>
FIPS_DEVICE int value_bits(const DecodeMatrix& m) {
  return m.storage == Storage::kPlain  ? 8 * static_cast<int>(sizeof(T))
         : m.storage == Storage::kInt8 ? 8
                                       : 4;
}

// Brings the values or codes as far as L2. Where in the block of a bitmap they lie is a guess from
// the mean density, which costs nothing when it is wrong.
template <class T>
FIPS_DEVICE void prefetch_values(const DecodeMatrix& m, const StepPlace& place,
                                 const GroupRef& ref) {
  constexpr int kLine = 128, kWorkers = kWarpSize / kDecodeMaxGroups;
  const int group = lane_index() % kDecodeMaxGroups, worker = lane_index() / kDecodeMaxGroups;
  const bool first_of_block = in_block(group * kDecodeGroup, m.reduce_shift) == 0;
  if (ref.block.id < 0 || !(m.columns || first_of_block)) {
    return;
  }
  const SlotRange slots = part_slots(m, place, place.position + group * kDecodeGroup, kDecodeGroup);
  int64_t begin = ref.block.id * int64_t{m.slots}, stored = m.slots;
  if (m.bitmap.mask != nullptr) {
    begin = max_of(0, ref.values_begin);
    stored = max_of(0, min_of(m.bitmap.num_values, ref.values_end) - begin);
  }
  const int bits = value_bits<T>(m);
  const unsigned char* values = static_cast<const unsigned char*>(m.values) + begin * bits / 8;
  const int64_t first = stored * slots.begin / m.slots * bits / 8;
  const int64_t last = stored * slots.end / m.slots * bits / 8;
  FIPS_UNROLL_BY(1)
  for (int64_t byte = first + worker * kLine; byte < last; byte += kWorkers * kLine) {
    prefetch_l2(values + byte);
  }
}

}  // namespace fips::cuda
