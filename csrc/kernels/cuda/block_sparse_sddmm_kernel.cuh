// block_sparse_sddmm on tensor cores (mma.sync): columns of V (features of b) are the 16 rows of an
// instruction, rows of V (features of a) its 8 columns, tokens the reduction. Both operands lie in
// memory with the reduction outermost, so both are transposed on the way to registers.
#pragma once

#include "kernels/cuda/block_sparse_sddmm_task.h"
#include "kernels/cuda/slice.cuh"

namespace fips::cuda {

template <class T>
struct SddmmConfig {
  static constexpr int kChunks = kSddmmTile / Chunk<T>::kSize;  // of one token in one operand
  static constexpr int kOperandBytes = kSddmmStepTokens * kSddmmTile * 2;
  static constexpr int kStageBytes = 2 * kOperandBytes;
  static constexpr int kStages = 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  // A warp owns a fixed part of the super-tile, so that its sums stay in registers.
  static constexpr int kColumnCells = 2, kRowCells = 4;
  static constexpr int kWarpColumns = kColumnCells * kSddmmCell, kWarpRows = kRowCells * kSddmmCell;
};

struct SddmmPlace {
  int64_t column, row;  // first column and row of V in the super-tile
  int64_t token, tokens_end;
  int split;
};

FIPS_DEVICE SddmmPlace locate_super_tile(const SddmmTask& task) {
  const int64_t row_tiles = ceil_div(task.v.rows, kSddmmTile);
  const int64_t tiles = row_tiles * ceil_div(task.v.cols, kSddmmTile);
  const int64_t tile = block_index() % tiles;
  const int split = static_cast<int>(block_index() / tiles);
  const int64_t token = split * task.split_tokens;
  return {tile / row_tiles * kSddmmTile, tile % row_tiles * kSddmmTile, token,
          min_of(task.tokens, token + task.split_tokens), split};
}

// The stored blocks under the cells of this warp's part: lane c < 8 holds that of cell c, and
// `mask` says which cells are stored.
struct SddmmCells {
  int id;
  uint32_t mask;
};

template <class T>
FIPS_DEVICE SddmmCells find_cells(const SddmmTask& task, int64_t column, int64_t row) {
  using Config = SddmmConfig<T>;
  constexpr int kCells = Config::kColumnCells * Config::kRowCells;
  const int cell = lane_index() % kCells;
  const int64_t cell_column = column + cell / Config::kRowCells * kSddmmCell;
  const int64_t cell_row = row + cell % Config::kRowCells * kSddmmCell;
  const int id = find_block(task.v, cell_row / task.v.bk, cell_column / task.v.bn);
  uint32_t mask = 0;
  FIPS_UNROLL
  for (int i = 0; i < kCells; ++i) {
    mask |= static_cast<uint32_t>(static_cast<int>(shuffle(static_cast<uint32_t>(id), i)) >= 0)
            << i;
  }
  return {id, mask};
}

// Whether any warp of the block has a stored cell.
FIPS_DEVICE bool any_stored(uint32_t mask, int warps) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
  if (lane_index() == 0) {
    shared[warp_index()] = mask;
  }
  block_barrier();
  uint32_t all = 0;
  for (int warp = 0; warp < warps; ++warp) {
    all |= shared[warp];
  }
  block_barrier();  // the words are overwritten by the first stage
  return all != 0;
}

template <class T>
FIPS_DEVICE void stage_operand(const T* source, int64_t stride, bool wide, int64_t token,
                               int64_t tokens_end, int64_t feature, int64_t features,
                               unsigned char* target) {
  using Config = SddmmConfig<T>;
  const int chunk = thread_index() % Config::kChunks;
  const int64_t first = feature + chunk * Chunk<T>::kSize;
  const int valid = static_cast<int>(max_of(0, min_of(Chunk<T>::kSize, features - first)));
  constexpr int kRows = Config::kThreads / Config::kChunks;
  FIPS_UNROLL
  for (int pass = 0; pass < kSddmmStepTokens / kRows; ++pass) {
    const int row = pass * kRows + thread_index() / Config::kChunks;
    const int count = token + row < tokens_end ? valid : 0;
    const T* from = count > 0 ? source + (token + row) * stride + first : source;
    stage_chunk(target + swizzled_offset<Config::kChunks>(row, chunk), from, count, wide);
  }
}

template <class T>
FIPS_DEVICE void stage_sddmm(const SddmmTask& task, const SddmmPlace& place, int64_t step,
                             unsigned char* stage) {
  const int64_t token = place.token + step * kSddmmStepTokens;
  stage_operand(static_cast<const T*>(task.b), task.b_stride, task.wide_b, token, place.tokens_end,
                place.column, task.v.cols, stage);
  stage_operand(static_cast<const T*>(task.a), task.a_stride, task.wide_a, token, place.tokens_end,
                place.row, task.v.rows, stage + SddmmConfig<T>::kOperandBytes);
}

template <class T>
struct SddmmSums {
  float value[SddmmConfig<T>::kColumnCells][SddmmConfig<T>::kRowCells][2][4];
};

// Sixteen tokens of the warp's cells.
template <class T>
FIPS_DEVICE void multiply_cells(SddmmSums<T>& sums, uint32_t mask, const unsigned char* stage,
                                int column, int row, int token) {
  using Config = SddmmConfig<T>;
  uint32_t b_side[Config::kColumnCells][4];
  FIPS_UNROLL
  for (int i = 0; i < Config::kColumnCells; ++i) {
    const Coord at = ldmatrix_a_transposed(lane_index());
    const int offset =
        swizzled_offset<Config::kChunks>(token + at.row, (column + i * kSddmmCell) / 8 + at.col);
    ldmatrix_x4_transposed(b_side[i], shared_address(stage + offset));
  }
  FIPS_UNROLL
  for (int j = 0; j < Config::kRowCells; ++j) {
    constexpr uint32_t kColumnOfCells = 1u | 1u << Config::kRowCells;
    if ((mask >> j & kColumnOfCells) == 0) {
      continue;
    }
    uint32_t a_side[4];
    const Coord at = ldmatrix_b_transposed(lane_index());
    const int offset =
        swizzled_offset<Config::kChunks>(token + at.row, (row + j * kSddmmCell) / 8 + at.col);
    ldmatrix_x4_transposed(a_side, shared_address(stage + Config::kOperandBytes + offset));
    FIPS_UNROLL
    for (int i = 0; i < Config::kColumnCells; ++i) {
      if ((mask >> (i * Config::kRowCells + j) & 1u) != 0) {
        mma_m16n8k16<T>(sums.value[i][j][0], b_side[i], a_side[0], a_side[1]);
        mma_m16n8k16<T>(sums.value[i][j][1], b_side[i], a_side[2], a_side[3]);
      }
    }
  }
}

template <class T>
FIPS_DEVICE void store_cells(const SddmmTask& task, const SddmmPlace& place,
                             const SddmmSums<T>& sums, const SddmmCells& cells, int64_t column,
                             int64_t row) {
  using Config = SddmmConfig<T>;
  const int64_t slots = task.v.slots();
  float* out = task.partial + place.split * task.v.num_blocks * slots;
  FIPS_UNROLL
  for (int i = 0; i < Config::kColumnCells; ++i) {
    FIPS_UNROLL
    for (int j = 0; j < Config::kRowCells; ++j) {
      const int cell = i * Config::kRowCells + j;
      const int id = static_cast<int>(shuffle(static_cast<uint32_t>(cells.id), cell));
      if (id < 0) {
        continue;
      }
      FIPS_UNROLL
      for (int part = 0; part < 4; ++part) {  // {8 rows of V} x {8 columns of V}
        const Coord at = accumulator_coord(lane_index(), part / 2 * 2);
        const int in_column = static_cast<int>((column + i * kSddmmCell) % task.v.bn) + at.row;
        const int in_row =
            static_cast<int>((row + j * kSddmmCell) % task.v.bk) + part % 2 * 8 + at.col;
        const float(&sum)[4] = sums.value[i][j][part % 2];
        float* target = out + id * slots + in_column * task.v.bk + in_row;
        Pair<float> pair{{sum[part / 2 * 2], sum[part / 2 * 2 + 1]}};
        if (task.accumulate) {  // each slot has one owner
          pair.element[0] += target[0];
          pair.element[1] += target[1];
        }
        *reinterpret_cast<Pair<float>*>(target) = pair;
      }
    }
  }
}

template <class T>
FIPS_KERNEL(SddmmConfig<T>::kThreads, 2)
block_sparse_sddmm_mma(const SddmmTask task) {
  using Config = SddmmConfig<T>;
  constexpr int kAhead = Config::kStages - 1;
  unsigned char* shared = dynamic_shared_memory();
  const SddmmPlace place = locate_super_tile(task);
  const int column = warp_index() % 4 * Config::kWarpColumns;
  const int row = warp_index() / 4 * Config::kWarpRows;
  const SddmmCells cells = find_cells<T>(task, place.column + column, place.row + row);
  if (!any_stored(cells.mask, Config::kWarps)) {
    return;
  }
  SddmmSums<T> sums{};
  const int64_t steps = ceil_div(place.tokens_end - place.token, kSddmmStepTokens);
  for (int64_t step = -kAhead; step < steps; ++step) {
    if (step >= 0) {
      cp_async_wait<kAhead - 1>();
      block_barrier();
    }
    if (step + kAhead < steps) {
      const int64_t slot = (step + kAhead) % Config::kStages;
      stage_sddmm<T>(task, place, step + kAhead, shared + slot * Config::kStageBytes);
    }
    cp_async_commit();
    if (step >= 0 && cells.mask != 0) {
      const unsigned char* stage = shared + step % Config::kStages * Config::kStageBytes;
      FIPS_UNROLL
      for (int token = 0; token < kSddmmStepTokens; token += 16) {
        multiply_cells<T>(sums, cells.mask, stage, column, row, token);
      }
    }
  }
  store_cells<T>(task, place, sums, cells, place.column + column, place.row + row);
}

}  // namespace fips::cuda
