// Expands a step of `bitmap` weights, or of codes, in the warp's slot, from where it looks like a
// copied one. Of a bitmap, the warp counts the ones of the mask words that its outputs and
// positions lie in and keeps each word with the number of values before it; then every lane looks
// up four neighbouring slots at a time. Four is a balance: neighbouring lanes read neighbouring
// values, so that a load touches one or two lines, and counting is paid for once per four slots.
#pragma once

#include "kernels/cuda/shared_mlp_decode_stream.cuh"
#include "kernels/cuda/slice.cuh"

namespace fips::cuda {

// Of one warp: the mask words of a step at the widest edges, and the values of the block before
// each.
struct MaskScan {
  static constexpr int kWords = 32 * 128 / 32;
  uint32_t bits[kWords];
  uint16_t before[kWords];  // a block has 16384 slots at most
};

// `mask`: of the stored block, in shared memory. Its words for `slots` go to scan[at...].
FIPS_DEVICE void scan_mask(const uint32_t* mask, const SlotRange& slots, int at, MaskScan& scan) {
  const int lane = lane_index(), first = slots.begin / 32, words = slots.end / 32 - first;
  uint32_t mine = 0;
  FIPS_UNROLL_BY(4)
  for (int word = lane; word < first; word += kWarpSize) {
    mine += popcount(mask[word]);
  }
  uint32_t before = first > 0 ? warp_sum(mine) : 0;
  FIPS_UNROLL_BY(1)
  for (int base = 0; base < words; base += kWarpSize) {
    const int word = base + lane;
    const uint32_t bits = word < words ? mask[first + word] : 0;
    const uint32_t start = before + warp_exclusive_sum(popcount(bits));
    if (word < words) {
      scan.bits[at + word] = bits;
      scan.before[at + word] = static_cast<uint16_t>(start);
    }
    before = shuffle(start + popcount(bits), kWarpSize - 1);
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T element[4];
};

// The value at `index`; `scale` is that of codes.
template <class T>
FIPS_DEVICE T value_at(const DecodeMatrix& m, int64_t index, float scale) {
  return m.storage == Storage::kPlain ? static_cast<const T*>(m.values)[index]
                                      : from_float<T>(code_at(m.storage, m.values, index) * scale);
}

// Four neighbouring slots of a bitmap, the first of which is bit `bit` of scanned word `word`.
template <class T>
FIPS_DEVICE Quad<T> expand_quad(const DecodeMatrix& m, const MaskScan& scan, int64_t base, int word,
                                int bit, float scale) {
  const uint32_t bits = scan.bits[word];
  const uint32_t mine = bits >> bit & 15u;
  int64_t index = base + scan.before[word] + popcount(bits & ((1u << bit) - 1u));
  // A mask and value_ptr that disagree must not lead out of the values.
  const bool sound = index >= 0 && index + popcount(mine) <= m.bitmap.num_values;
  Quad<T> quad{};
  FIPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (sound && (mine >> i & 1u) != 0) {
      quad.element[i] = value_at<T>(m, index, scale);
    }
    index += mine >> i & 1u;
  }
  return quad;
}

// Four neighbouring codes from `index` on.
template <class T>
FIPS_DEVICE Quad<T> decode_quad(const DecodeMatrix& m, int64_t index, float scale) {
  Quad<T> quad;
  FIPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    quad.element[i] = value_at<T>(m, index + i, scale);
  }
  return quad;
}

// The part of the step that stored block `id` covers: `positions` from `first` on. Its mask words
// are scan[at...]; returns their number.
template <class T>
FIPS_DEVICE int expand_part(const DecodeMatrix& m, int id, const StepPlace& place, int first,
                            int positions, const MaskScan& scan, int at, unsigned char* step) {
  using Step = DecodeStep<T>;
  const SlotRange slots = part_slots(m, place, place.position + first, positions);
  const int first_k = m.columns ? in_block(place.out, m.out_shift)
                                : in_block(place.position + first, m.reduce_shift);
  const int row_slots = m.columns ? place.out_tile : positions;
  const int shift = log2_of_edge(row_slots) - 2;  // of quads in a row
  const int quads = (slots.end - slots.begin) >> m.k_shift << shift;
  const int chunks_shift = column_chunks_shift<T>(place.out_tile);
  const bool bitmap = m.bitmap.mask != nullptr;
  const int64_t base = id < 0   ? 0
                       : bitmap ? m.bitmap.value_ptr[id]
                                : id * int64_t{m.slots} + slots.begin;
  const Half* scales = m.storage == Storage::kPlain
                           ? nullptr
                           : m.scales + ((id * int64_t{m.slots} + slots.begin) >> m.k_shift);
  FIPS_UNROLL_BY(4)
  for (int item = lane_index(); item < quads; item += kWarpSize) {
    const int row = item >> shift, column = in_block(item, shift) * 4;
    const int slot = (row << m.k_shift) + first_k + column;
    Quad<T> quad{};
    if (id >= 0) {
      const float scale = scales == nullptr ? 0.0f : to_float(scales[row]);
      quad = bitmap ? expand_quad<T>(m, scan, base, at + slot / 32, slot % 32, scale)
                    : decode_quad<T>(m, base + slot, scale);
    }
    const int offset = m.columns
                           ? column_step_offset(first + row, column / Step::kChunk, chunks_shift)
                           : row_step_offset(row, (first + column) / Step::kChunk);
    const int inside = column % Step::kChunk * static_cast<int>(sizeof(T));
    *reinterpret_cast<Quad<T>*>(step + offset + inside) = quad;
  }
  return (slots.end - slots.begin) / 32;
}

// All lanes of a warp; readers need no further barrier. The slot holds masks before and weights
// after, so every mask is scanned first.
template <class T>
FIPS_DEVICE void expand_step(const DecodeMatrix& m, const StepMeta& meta, const StepPlace& place,
                             MaskScan& scan, unsigned char* step) {
  const BitmapParts parts = bitmap_parts<T>(m);
  int words = 0;
  FIPS_UNROLL_BY(1)
  for (int part = 0; part < parts.count; ++part) {
    const int offset = part * parts.positions, id = meta.id[offset / kDecodeGroup];
    const SlotRange slots = part_slots(m, place, place.position + offset, parts.positions);
    if (id >= 0 && m.bitmap.mask != nullptr) {
      scan_mask(reinterpret_cast<const uint32_t*>(step + part * parts.mask_stride), slots, words,
                scan);
    }
    words += (slots.end - slots.begin) / 32;
  }
  warp_barrier();
  words = 0;
  FIPS_UNROLL_BY(1)
  for (int part = 0; part < parts.count; ++part) {
    const int offset = part * parts.positions;
    words += expand_part<T>(m, meta.id[offset / kDecodeGroup], place, offset, parts.positions, scan,
                            words, step);
  }
  warp_barrier();
}

}  // namespace fips::cuda
