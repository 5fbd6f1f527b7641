// Slices from hostile bytes. What check_view and derive_index accept is a slice: every kernel runs
// on it, and the product is that of its dense matrix. What they refuse, the products that promise
// to be safe for any index still run on, without a read or write out of bounds.
//
// An input is a header, then edits of the arrays of a well-formed slice: close enough to pass most
// checks, and to reach what is behind them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../cpp/elements.h"
#include "core/pack.h"
#include "core/parallel.h"
#include "kernels/block_sparse_mm.h"
#include "kernels/block_sparse_sddmm.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/dense_fill.h"
#include "kernels/shared_mlp.h"

namespace {

using namespace fips;
using fips::testing::Elements;

void require(bool condition) {
  if (!condition) {
    abort();
  }
}

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  uint8_t byte() { return empty() ? 0 : data_[at_++]; }
  int32_t word() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      value = value << 8 | byte();
    }
    return static_cast<int32_t>(value);
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

constexpr int32_t kEdges[] = {16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 32, 64, 128};

struct Header {
  int32_t bk, bn;
  int64_t rows, cols, tokens;
  bool bitmap, transpose;
  Storage storage;
  DType dtype;
  uint32_t pattern;  // which blocks and slots are stored
};

Header read_header(Input& in) {
  Header h;
  h.bk = kEdges[in.byte() % 16];
  h.bn = kEdges[in.byte() % 16];
  h.rows = 1 + in.byte() % (2 * h.bk + 8);
  h.cols = 1 + in.byte() % (2 * h.bn + 8);
  h.tokens = in.byte() % 4;
  const uint8_t flags = in.byte();
  h.bitmap = (flags & 1) != 0;
  h.transpose = (flags & 2) != 0;
  h.storage = static_cast<Storage>((flags >> 2) % 3);
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  h.dtype = kDTypes[(flags >> 4) % 4];
  h.pattern = static_cast<uint32_t>(in.word());
  return h;
}

// Small integers: sums are exact in every order.
float value_of(int64_t i) { return static_cast<float>(i % 5 - 2); }

PackedSlice well_formed(const Header& h) {
  std::vector<float> dense(static_cast<size_t>(h.rows * h.cols));
  std::vector<uint8_t> keep(dense.size());
  for (int64_t i = 0; i < h.rows * h.cols; ++i) {
    const int64_t block = i / h.cols / h.bk * 3 + i % h.cols / h.bn;
    keep[i] = (h.pattern >> (block % 16) & 1) && (!h.bitmap || (h.pattern >> (16 + i % 16) & 1));
    dense[i] = keep[i] ? value_of(i) : 0.0f;
  }
  return pack(dense.data(), keep.data(), h.rows, h.cols, h.bk, h.bn, sizeof(float), h.bitmap);
}

// Everything that a file could get wrong, in arrays of the lengths that their sizes ask for.
struct Hostile {
  Header h;
  PackedSlice slice;
  std::vector<uint8_t> values;
  std::vector<Half> scales;

  void edit(Input& in) {
    while (!in.empty()) {
      const uint8_t which = in.byte(), where = in.byte();
      const int32_t value = in.word();
      auto set = [&](auto& array) {
        if (!array.empty()) {
          array[where % array.size()] =
              static_cast<typename std::decay_t<decltype(array)>::value_type>(value);
        }
      };
      switch (which % 7) {
        case 0:
          set(slice.col_ptr);
          break;
        case 1:
          set(slice.row_idx);
          break;
        case 2:
          set(slice.row_ptr);
          break;
        case 3:
          set(slice.col_idx);
          break;
        case 4:
          set(slice.block_id);
          break;
        case 5:
          set(slice.block_ptr);
          break;
        default:
          set(slice.mask);
      }
    }
  }

  BlockSparseView view() const {
    BlockSparseView v = slice.view(h.dtype);
    v.storage = h.storage;
    v.values = values.data();
    if (h.storage != Storage::kPlain) {
      v.scales = scales.data();
    }
    return v;
  }
};

int64_t element_bytes(const Header& h, int64_t count) {
  switch (h.storage) {
    case Storage::kInt8:
      return count;
    case Storage::kInt4:
      return (count + 1) / 2;
    default:
      return count * element_size(h.dtype);
  }
}

Elements ones(DType dtype, int64_t count) {
  return Elements(std::vector<float>(static_cast<size_t>(count), 1.0f), dtype);
}

bool multiply(const BlockSparseView& v, const Header& h, std::vector<uint8_t>& out) {
  BlockSparseMmParams p;
  p.v = v;
  p.transpose = h.transpose;
  p.tokens = h.tokens;
  p.x_stride = p.in_features();
  p.out_stride = p.out_features();
  const Elements x = ones(h.dtype, h.tokens * p.x_stride);
  out.assign(static_cast<size_t>(h.tokens * p.out_stride * element_size(h.dtype)), 0);
  p.x = x.data();
  p.out = out.data();
  const MmEpilogue none;
  std::vector<uint8_t> workspace(
      static_cast<size_t>(cpu::block_sparse_mm_workspace(p, none, kSerial)));
  return cpu::block_sparse_mm(p, none, workspace.data(), kSerial);
}

bool decode(const BlockSparseView& v, const Header& h) {
  const int64_t width = 3, hidden = v.cols, rank = v.rows;
  const Elements x = ones(h.dtype, h.tokens * width), base = ones(h.dtype, width * rank);
  std::vector<uint8_t> y(static_cast<size_t>(h.tokens * width * element_size(h.dtype)));
  SharedMlpParams p;
  p.dtype = h.dtype;
  p.width = width;
  p.x = x.data();
  p.tokens = h.tokens;
  p.x_stride = p.y_stride = width;
  p.base = p.base_out = base.data();
  p.rank = p.rank_out = rank;
  p.up = p.down = v;
  p.activation = Activation::kRelu;
  p.y = y.data();
  require(p.hidden() == hidden);
  if (!cpu::decodes_shared_mlp(p)) {
    return true;
  }
  std::vector<uint8_t> workspace(static_cast<size_t>(cpu::shared_mlp_decode_workspace(p, kSerial)));
  return cpu::shared_mlp_decode(p, workspace.data(), kSerial);
}

// float32 and plain: the product of ones is the sum over a column, or a row, of the dense matrix.
void check_product(const Hostile& hostile, const std::vector<uint8_t>& out) {
  const Header& h = hostile.h;
  std::vector<float> dense(static_cast<size_t>(h.rows * h.cols));
  PackedSlice slice = hostile.slice;
  slice.values = hostile.values;
  unpack(slice, dense.data());
  const int64_t outputs = h.transpose ? h.rows : h.cols, inputs = h.transpose ? h.cols : h.rows;
  for (int64_t o = 0; h.tokens > 0 && o < outputs; ++o) {
    float expected = 0, found;
    for (int64_t i = 0; i < inputs; ++i) {
      expected += h.transpose ? dense[o * h.cols + i] : dense[i * h.cols + o];
    }
    memcpy(&found, out.data() + o * sizeof found, sizeof found);
    require(found == expected);
  }
}

}  // namespace

// What costs most of the time and finds little here: no pointer to a stack outlives its frame, and
// a small quarantine stays in the cache.
extern "C" const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:quarantine_size_mb=4";
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const cpu::Isa isas[] = {cpu::Isa::kScalar, cpu::Isa::kAvx2, cpu::Isa::kAvx512,
                           cpu::Isa::kAvx512Bf16};
  const cpu::Isa isa = isas[in.byte() % 4];
  if (isa > cpu::detect_isa()) {
    return 0;
  }
  setenv("FIPS_CPU_CAPABILITY", cpu::isa_name(isa), 1);
  Hostile hostile;
  hostile.h = read_header(in);
  const Header& h = hostile.h;
  hostile.slice = well_formed(h);
  const int64_t count = hostile.slice.num_values();
  hostile.edit(in);

  // The checkpoint's part of the index alone: what derive_index makes of it is well formed.
  PackedSlice derived = hostile.slice;
  try {
    derive_index(derived);
    check_view(derived.view(DType::kFloat32), "derived");
  } catch (const Error&) {
    derived.rows = -1;
  }
  if (derived.rows >= 0 && h.storage == Storage::kPlain && h.dtype == DType::kFloat32) {
    Hostile good{h, derived, derived.values, {}};
    std::vector<uint8_t> out;
    require(multiply(good.view(), h, out));
    check_product(good, out);
  }

  hostile.values = h.storage == Storage::kPlain && h.dtype == DType::kFloat32
                       ? hostile.slice.values
                       : std::vector<uint8_t>(element_bytes(h, count));
  hostile.scales = std::vector<Half>(static_cast<size_t>(hostile.slice.num_blocks() * h.bn),
                                     FromAccumulator<Half>::convert(1.0f));
  BlockSparseView v = hostile.view();
  v.num_values = h.storage == Storage::kInt4 ? count + count % 2 : count;
  bool valid = true;
  try {
    check_view(v, "v");
  } catch (const Error&) {
    valid = false;
  }
  try {
    check_sizes(v, "v");
  } catch (const Error&) {
    return 0;
  }
  std::vector<uint8_t> out;
  const bool whole = multiply(v, h, out);
  const bool decoded = decode(v, h);
  if (!valid) {
    return 0;
  }
  require(whole && decoded);
  if (h.storage == Storage::kPlain && h.dtype == DType::kFloat32) {
    check_product(hostile, out);
  }
  std::vector<uint8_t> dense(static_cast<size_t>(h.rows * h.cols * element_size(h.dtype)));
  cpu::fill_dense_transposed(v, dense.data(), kSerial);
  if (h.storage == Storage::kPlain) {
    const Elements a = ones(h.dtype, h.tokens * h.rows), b = ones(h.dtype, h.tokens * h.cols);
    std::vector<double> sums(static_cast<size_t>(count));  // as wide as any accumulator
    BlockSparseSddmmParams p;
    p.v = v;
    p.a = a.data();
    p.a_stride = h.rows;
    p.b = b.data();
    p.b_stride = h.cols;
    p.tokens = h.tokens;
    p.out = sums.data();
    cpu::block_sparse_sddmm(p, kSerial);
  }
  return 0;
}
