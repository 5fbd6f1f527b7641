// block_sparse_mm for one instruction set (the including file sets FIPS_ISA and the compiler
// flags): many tokens. A task is (group of tokens, output edge): the edge's blocks become weight
// tiles, as many at a time as the first-level caches hold, and every token of the group passes over
// them.
//   forward     out[j] = sum over k of V[k, j] x[k]   output edge: block column
//   transposed  out[k] = sum over j of V[k, j] x[j]   output edge: block row
#pragma once

#include <atomic>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/epilogue.h"
#include "kernels/cpu/multiply_bfloat16.h"
#include "kernels/cpu/multiply_vector.h"

namespace fips::cpu::FIPS_ISA {
namespace {

template <class T>
struct RowsOf {
  using type = VectorRows<T>;
};
#if defined(__AMX_BF16__)
template <>
struct RowsOf<BFloat16> {
  using type = AmxRows;
};
#elif defined(__AVX512BF16__)
template <>
struct RowsOf<BFloat16> {
  using type = PairRows;
};
#endif

// The stored blocks that contribute to one output edge (a block column, or a block row when
// transposed). Every index is checked where it is used, which costs nothing beside a block's work
// and makes the kernels safe with any index: strays are skipped and reported.
class EdgeBlocks {
 public:
  EdgeBlocks(const BlockSparseView& v, bool transpose, int64_t edge, std::atomic<bool>* stray)
      : v_(v),
        input_(transpose ? v.col_idx : v.row_idx),
        id_(transpose ? v.block_id : nullptr),
        in_edge_(transpose ? v.bn : v.bk),
        in_blocks_(transpose ? v.block_cols() : v.block_rows()),
        begin_((transpose ? v.row_ptr : v.col_ptr)[edge]),
        end_((transpose ? v.row_ptr : v.col_ptr)[edge + 1]),
        stray_(stray) {
    if (begin_ < 0 || end_ < begin_ || end_ > v.num_blocks) {
      stray_->store(true, std::memory_order_relaxed);
      begin_ = end_ = 0;
    }
  }

  // Calls body(stored block, first input feature).
  template <class F>
  inline __attribute__((always_inline)) void for_each(F&& body) const {
    for (int64_t i = begin_; i < end_; ++i) {
      const int64_t block = id_ == nullptr ? i : id_[i];
      if (input_[i] < 0 || input_[i] >= in_blocks_ || block < 0 || block >= v_.num_blocks ||
          (v_.is_bitmap() && (v_.block_ptr[block] < 0 || v_.block_ptr[block] > v_.num_values))) {
        stray_->store(true, std::memory_order_relaxed);
        continue;
      }
      body(block, input_[i] * in_edge_);
    }
  }

 private:
  const BlockSparseView& v_;
  const int32_t* input_;  // input block of the i-th entry
  const int32_t* id_;     // stored block of the i-th entry; null: i itself
  int64_t in_edge_, in_blocks_, begin_, end_;
  std::atomic<bool>* stray_;
};

constexpr int64_t kNearBytes = 1 << 20;   // of a group's panels
constexpr int64_t kSumBytes = 128 << 10;  // of a group's sums on the stack
constexpr int64_t kTileBytes = 64 << 10;  // of the weight tiles in use
constexpr int64_t kMaxPieces = kTileBytes / (16 * 16 * 2);

// The weight tiles of one output edge, made run by run.
template <class T, bool kTranspose>
class EdgeTask {
  using Rows = typename RowsOf<T>::type;
  using Weight = typename Rows::Weight;
  using Sum = typename Rows::Sum;
  static constexpr int64_t kTileElements =
      max_of(kTileBytes / static_cast<int64_t>(sizeof(Weight)), kMaxEdge* kMaxEdge);

 public:
  explicit EdgeTask(const MmTask& task)
      : task_(task), rows_(kTranspose ? task.params.v.bn : task.params.v.bk) {}

  void run(int64_t edge, int64_t first_token, int64_t tokens) {
    const BlockSparseMmParams& p = task_.params;
    const int64_t out_edge = kTranspose ? p.v.bk : p.v.bn;
    const int64_t first_output = edge * out_edge;
    const Epilogue<T> epilogue(p, task_.epilogue, task_.bypass, first_output,
                               min_of(out_edge, p.out_features() - first_output));
    epilogue_ = &epilogue;
    first_token_ = first_token;
    tokens_ = tokens;
    out_edge_ = out_edge;
    first_run_ = true;
    clear();
    gather(p.v, 0, edge);
    if (task_.epilogue.gate != nullptr) {
      gather(*task_.epilogue.gate, 1, edge);
    }
    multiply(true);
  }

 private:
  void clear() {
    pieces_used_ = elements_used_ = 0;
    count_[0] = count_[1] = 0;
  }

  // Adds the tiles of `v` at `edge`, multiplying whenever no more fit.
  void gather(const BlockSparseView& v, int64_t factor, int64_t edge) {
    const EdgeBlocks blocks(v, kTranspose, edge, task_.stray);
    blocks.for_each([&](int64_t block, int64_t input) {
      if (elements_used_ + v.slots() > kTileElements || pieces_used_ == kMaxPieces) {
        multiply(false);
        clear();
      }
      const Weight* tile =
          Rows::template tile<kTranspose>(v, block, scratch_, tiles_ + elements_used_);
      pieces_[pieces_used_++] = {tile, input, kTranspose ? v.bn : v.bk};
      elements_used_ += v.slots();
      ++count_[factor];
    });
  }

  // Passes the group's tokens over the tiles gathered so far; `last` stores the outputs.
  void multiply(bool last) {
    const bool gated = task_.epilogue.gate != nullptr;
    const auto* x =
        static_cast<const typename Rows::Input*>(task_.panel) + first_token_ * task_.padded;
    const bool only_run = first_run_ && last;
    Sum* gate_sums = sums_ + kSumBytes / 2 / static_cast<int64_t>(sizeof(Sum));
    for (int64_t t = 0; t < tokens_; t += Rows::kRows, x += Rows::kRows * task_.padded) {
      const int64_t count = min_of(Rows::kRows, tokens_ - t);
      // Sums that no second run needs stay in one place, in the first-level cache.
      const int64_t offset = only_run ? 0 : t * out_edge_;
      if (first_run_ || count_[0] > 0) {
        rows_.multiply(x, task_.padded, pieces_, count_[0], out_edge_, count, !first_run_,
                       sums_ + offset);
      }
      if (gated && (first_run_ || count_[1] > 0)) {
        rows_.multiply(x, task_.padded, pieces_ + count_[0], count_[1], out_edge_, count,
                       !first_run_, gate_sums + offset);
      }
      if (last) {
        epilogue_->write(sums_ + offset, gated ? gate_sums + offset : nullptr, out_edge_,
                         first_token_ + t, count);
      }
    }
    first_run_ = false;
  }

  const MmTask& task_;
  Rows rows_;
  const Epilogue<T>* epilogue_ = nullptr;
  int64_t first_token_ = 0, tokens_ = 0, out_edge_ = 0;
  bool first_run_ = true;
  int64_t pieces_used_ = 0, elements_used_ = 0;
  int64_t count_[2] = {0, 0};  // pieces of v and of the gate, in this order
  Piece<Weight> pieces_[kMaxPieces];
  alignas(64) Sum sums_[kSumBytes / sizeof(Sum)];
  alignas(64) Weight tiles_[kTileElements];
  alignas(64) T scratch_[kMaxEdge * kMaxEdge];
};

MmPanel mm_panel(DType dtype) {
  return with_element_type(dtype, [](auto element) -> MmPanel {
    using Rows = typename RowsOf<decltype(element)>::type;
    return {Rows::kRows, sizeof(typename Rows::Input)};
  });
}

// Panels of kRows tokens each, [begin, end).
void mm_pack(const MmTask& task, void* panel, int64_t begin, int64_t end) {
  const BlockSparseMmParams& p = task.params;
  with_element_type(p.v.dtype, [&](auto element) {
    using T = decltype(element);
    using Rows = typename RowsOf<T>::type;
    const Rows rows(p.transpose ? p.v.bn : p.v.bk);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * Rows::kRows;
      rows.pack(static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride,
                min_of(Rows::kRows, p.tokens - first), p.in_features(), task.padded,
                static_cast<typename Rows::Input*>(panel) + first * task.padded);
    }
  });
}

// Tokens per task: as many as keep their panels in a common second-level cache and whose sums fit,
// whatever the height of a panel; but enough to make the weight tiles for.
int64_t mm_max_group(const MmTask& task) {
  const BlockSparseMmParams& p = task.params;
  const MmPanel panel = mm_panel(p.v.dtype);
  const int64_t size = p.v.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t outputs = (p.transpose ? p.v.bk : p.v.bn) * (task.epilogue.gate == nullptr ? 1 : 2);
  const int64_t near = kNearBytes / max_of(1, task.padded * panel.element_size);
  return min_of(max_of(p.transpose ? 128 : 256, min_of(512, near)),
                kSumBytes / (outputs * size) - panel.rows);
}

// Tasks [begin, end): output edges innermost, so that a group's x stays in cache.
void mm_tiled(const MmTask& task, int64_t begin, int64_t end) {
  with_element_type(task.params.v.dtype, [&](auto element) {
    using T = decltype(element);
    auto run = [&](auto transpose) {
      const BlockSparseMmParams& p = task.params;
      const int64_t edges = p.transpose ? p.v.block_rows() : p.v.block_cols();
      EdgeTask<T, decltype(transpose)::value> edge_task(task);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / edges * task.group;
        edge_task.run(i % edges, first, min_of(task.group, p.tokens - first));
      }
#if defined(__AVX512F__)
      _mm_sfence();  // stores that bypassed the cache become visible before the task ends
#endif
    };
    task.params.transpose ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace
}  // namespace fips::cpu::FIPS_ISA
