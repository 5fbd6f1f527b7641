// From stable tensors to views, with every check an op makes on its arguments; and calls back into
// torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/format.h"
#include "core/huge_pages.h"
#include "core/parallel.h"

namespace fips {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  }
  return text + "]";
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, ": dtype ", torch::headeronly::toString(t.scalar_type()),
           " is not supported; use float32, bfloat16, float16 or (on the CPU) float64");
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

// The type gradients are summed in.
inline ScalarType accumulator_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Without a call through the dispatcher where there is nothing to copy: it costs as much as a small
// product.
inline Tensor contiguous_of(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline bool same_device(const Tensor& t, const Tensor& x) {
  return t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index();
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
  FIPS_CHECK(same_device(t, x), name, ": is on another device than x; move it with .to(x.device)");
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_same_device(t, x, name);
  FIPS_CHECK(t.scalar_type() == x.scalar_type(), name, ": dtype is ",
             torch::headeronly::toString(t.scalar_type()), ", but x is ",
             torch::headeronly::toString(x.scalar_type()), "; cast one of them");
}

inline void check_vector(const std::optional<Tensor>& t, int64_t length, const Tensor& x,
                         const char* name) {
  if (!t.has_value()) {
    return;
  }
  check_like(*t, x, name);
  FIPS_CHECK(t->dim() == 1 && t->size(0) == length, name, ": expected shape [", length, "], got ",
             shape_of(*t));
}

inline int64_t last_dim(const Tensor& t, const char* name) {
  FIPS_CHECK(t.dim() >= 1, name, ": expected at least one dimension (features last), got a scalar");
  return t.size(t.dim() - 1);
}

// [..., features] as contiguous [tokens, features].
inline Tensor flatten_tokens(const Tensor& t) {
  const int64_t features = t.size(t.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    tokens *= t.size(i);
  }
  if (t.dim() == 2) {
    return contiguous_of(t);
  }
  return contiguous_of(torch::stable::reshape(t, {tokens, features}));
}

// [..., features] as [tokens, features] with contiguous features: a view wherever the strides allow
// it.
inline Tensor token_rows(const Tensor& t) {
  const int64_t features = t.size(t.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    tokens *= t.size(i);
  }
  const Tensor rows = t.dim() == 2 ? t : torch::stable::reshape(t, {tokens, features});
  return features <= 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// The shape of `t` with another last dimension.
inline std::vector<int64_t> with_last_dim(const Tensor& t, int64_t features) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = features;
  return sizes;
}

inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  constexpr int64_t kLargeBytes = 4 << 20;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes >= kLargeBytes && !t.is_cuda()) {
    advise_huge_pages(t.mutable_data_ptr(), bytes);
  }
  return t;
}
inline Tensor make_zeros(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

// One BlockSparse slice: a view and the tensors that keep its memory alive.
struct Slice {
  TensorList tensors;
  BlockSparseView view;

  const Tensor& values() const { return tensors[0]; }
};

// Checks types, shapes and devices of the tensors of a slice, reading none of their contents: a
// kernel guards its indices itself, or its caller validates them (Factor::verify).
inline Slice slice_of(const TensorList& v, int64_t rows, int64_t cols, const Tensor& x,
                      const char* name) {
  FIPS_CHECK(v.size() >= 6 && v.size() <= 9, name,
             ": a slice is 6 tensors (block) or 8 (bitmap), and one more of scales where it is "
             "quantised, got ",
             v.size(), "; pass BlockSparse.tensors()");
  const bool bitmap = v.size() >= 8, quantised = v.size() % 2 == 1;
  const size_t scales = v.size() - 1;  // which tensor, where it is quantised
  Slice slice{v, {}};
  if (quantised) {
    FIPS_CHECK(v[0].scalar_type() == ScalarType::Char || v[0].scalar_type() == ScalarType::Byte,
               name, ".values: dtype is ", torch::headeronly::toString(v[0].scalar_type()),
               "; of a slice with scales it is int8, or uint8 for two codes of 4 bits");
  } else {
    FIPS_CHECK(v[0].scalar_type() == x.scalar_type(), name, ".values: dtype is ",
               torch::headeronly::toString(v[0].scalar_type()), ", but x is ",
               torch::headeronly::toString(x.scalar_type()), "; cast one of them");
  }
  static constexpr const char* kNames[] = {"values",  "col_ptr",  "row_idx", "row_ptr",
                                           "col_idx", "block_id", "mask",    "block_ptr"};
  auto name_of = [&](size_t i) { return quantised && i == scales ? "scales" : kNames[i]; };
  auto type_of = [&](size_t i) {
    if (quantised && i == scales) {
      return ScalarType::Half;
    }
    return i == 6 ? ScalarType::Byte : ScalarType::Int;
  };
  for (size_t i = 0; i < v.size(); ++i) {
    FIPS_CHECK(same_device(v[i], x), name, ".", name_of(i),
               ": is on another device than x; move it with .to(x.device)");
    if (i > 0) {
      const ScalarType wanted = type_of(i);
      FIPS_CHECK(v[i].scalar_type() == wanted, name, ".", name_of(i), ": dtype is ",
                 torch::headeronly::toString(v[i].scalar_type()), "; expected ",
                 torch::headeronly::toString(wanted));
      FIPS_CHECK(wanted != ScalarType::Int || v[i].dim() == 1, name, ".", name_of(i),
                 ": expected one dimension, got ", shape_of(v[i]));
    }
    if (!v[i].is_contiguous()) {
      slice.tensors[i] = torch::stable::contiguous(v[i]);
    }
  }
  const Tensor& shaped =
      bitmap ? v[6] : v[0];  // the tensor that shows the block: [nnzb, bn, bk or bk / 8]
  FIPS_CHECK(shaped.dim() == 3, name, bitmap ? ".mask" : ".values", ": expected 3 dimensions, got ",
             shape_of(shaped));
  BlockSparseView& view = slice.view;
  FIPS_CHECK(rows >= 0 && cols >= 0, name, ": shape (", rows, ", ", cols, ") must not be negative");
  view.rows = rows;
  view.cols = cols;
  FIPS_CHECK(shaped.size(1) <= 128 && shaped.size(2) <= 128, name,
             ": block edges must be 16, 32, 64 or 128");
  if (quantised) {
    view.storage = v[0].scalar_type() == ScalarType::Char ? Storage::kInt8 : Storage::kInt4;
  }
  const int32_t codes = view.storage == Storage::kInt4 ? 2 : 1;  // in an element of the values
  view.bn = static_cast<int32_t>(shaped.size(1));
  view.bk = static_cast<int32_t>(shaped.size(2) * (bitmap ? 8 : codes));
  FIPS_CHECK(is_allowed_block_edge(view.bk) && is_allowed_block_edge(view.bn), name, ": block is ",
             view.bk, "x", view.bn, "; each edge must be 16, 32, 64 or 128");
  view.num_blocks = shaped.size(0);
  view.num_values = v[0].numel() * codes;
  view.dtype = dtype_of(x, "x");
  const int64_t lengths[] = {0,
                             view.block_cols() + 1,
                             view.num_blocks,
                             view.block_rows() + 1,
                             view.num_blocks,
                             view.num_blocks,
                             0,
                             view.num_blocks + 1};
  for (size_t i = 1; i < (quantised ? scales : v.size()); ++i) {
    FIPS_CHECK(i == 6 || v[i].size(0) == lengths[i], name, ".", kNames[i], ": expected ",
               lengths[i], " entries for shape (", rows, ", ", cols, ") in blocks of ", view.bk,
               "x", view.bn, ", got ", v[i].size(0));
  }
  if (quantised) {
    const Tensor& s = v[scales];
    FIPS_CHECK(s.dim() == 2 && s.size(0) == view.num_blocks && s.size(1) == view.bn, name,
               ".scales: expected shape [", view.num_blocks, ", ", view.bn, "], got ", shape_of(s));
    view.scales = static_cast<const Half*>(slice.tensors[scales].const_data_ptr());
  }
  view.values = slice.tensors[0].const_data_ptr();
  auto index = [&](size_t i) {
    return static_cast<const int32_t*>(slice.tensors[i].const_data_ptr());
  };
  view.col_ptr = index(1);
  view.row_idx = index(2);
  view.row_ptr = index(3);
  view.col_idx = index(4);
  view.block_id = index(5);
  if (bitmap) {
    FIPS_CHECK(v[0].dim() == 1, name, ".values: expected one dimension, got ", shape_of(v[0]));
    static constexpr uint8_t kNoMask[8] =
        {};  // an empty tensor's pointer may be null, which would mean `block`
    view.mask = view.num_blocks == 0
                    ? kNoMask
                    : static_cast<const uint8_t*>(slice.tensors[6].const_data_ptr());
    view.block_ptr = index(7);
  }
  return slice;
}

// torch's own threads, as the callback that kernels take.
inline void run_on_torch_threads(int64_t tasks, int64_t grain, Parallel::Body body, void* context) {
  if (tasks <= 0) {
    return;
  }
  torch::stable::parallel_for(0, tasks, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
inline int64_t torch_threads() { return torch::stable::get_num_threads(); }
inline constexpr Parallel kTorchThreads{run_on_torch_threads, torch_threads};

// Calls an ATen op by name and returns its first `kOutputs` results.
template <size_t kOutputs = 1, class... Args>
std::array<Tensor, kOutputs> call_aten(const char* name, const char* overload,
                                       const Args&... args) {
  constexpr size_t kStack = sizeof...(Args) > kOutputs ? sizeof...(Args) : kOutputs;
  std::array<StableIValue, kStack> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, kOutputs> results;
  for (size_t i = 0; i < kOutputs; ++i) {
    results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return results;
}

// A result of an inner ATen call that is about to be read through its pointer.
inline Tensor expect_contiguous(const Tensor& t, ScalarType dtype) {
  FIPS_CHECK(t.scalar_type() == dtype, "internal: an ATen product returned ",
             torch::headeronly::toString(t.scalar_type()), " instead of ",
             torch::headeronly::toString(dtype), "; please report this");
  return contiguous_of(t);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, -2, -1); }
inline Tensor columns(const Tensor& t, int64_t first, int64_t count) {
  Tensor base = t;
  return torch::stable::narrow(base, t.dim() - 1, first, count);
}

// ---- ranges of tokens
// ----------------------------------------------------------------------------

// Calls body(first, count) for chunks of tokens.
template <class F>
void for_each_chunk(int64_t tokens, int64_t chunk, const F& body) {
  for (int64_t first = 0; first < tokens; first += chunk) {
    body(first, min_of(chunk, tokens - first));
  }
}

inline Tensor range_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor base = t;
  return torch::stable::narrow(base, 0, first, count);
}

inline void copy_rows_into(const Tensor& all, int64_t first, const Tensor& part) {
  Tensor target = range_of(all, first, part.size(0));
  torch::stable::copy_(target, part);
}

}  // namespace fips
