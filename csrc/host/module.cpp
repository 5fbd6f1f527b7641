// fips_ext._host: the torch-free core for NumPy users.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "core/pack.h"
#include "kernels/cpu/dispatch.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using ByteMatrix = py::array_t<bool, py::array::c_style | py::array::forcecast>;

// Elements are moved as raw bytes, so anything but plain numbers (objects!) is refused.
void check_elements(const py::array& values, const char* name) {
  const char kind = values.dtype().kind();
  const py::ssize_t size = values.itemsize();
  FIPS_CHECK((kind == 'f' || kind == 'i' || kind == 'u') && (size == 2 || size == 4 || size == 8),
             name, ": expected floats or integers of 2, 4 or 8 bytes, got kind '", kind, "' of ",
             size, " bytes (view bfloat16 as uint16)");
}

bool is_bitmap(const std::string& encoding) {
  FIPS_CHECK(encoding == "block" || encoding == "bitmap", "encoding: got '", encoding,
             "'; allowed are 'block' and 'bitmap'");
  return encoding == "bitmap";
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict pack(const py::array& dense, const ByteMatrix& keep, std::pair<int32_t, int32_t> block,
              const std::string& encoding) {
  const bool bitmap = is_bitmap(encoding);
  check_elements(dense, "dense");
  FIPS_CHECK(dense.ndim() == 2, "dense: expected a matrix, got ", dense.ndim(), " dimensions");
  FIPS_CHECK(keep.ndim() == 2 && keep.shape(0) == dense.shape(0) && keep.shape(1) == dense.shape(1),
             "keep: must have the shape of dense");
  const py::array rows = py::array::ensure(dense, py::array::c_style);
  const fips::PackedSlice slice = fips::pack(
      rows.data(), reinterpret_cast<const uint8_t*>(keep.data()), dense.shape(0), dense.shape(1),
      block.first, block.second, static_cast<int32_t>(dense.itemsize()), bitmap);
  const std::vector<py::ssize_t> count = {static_cast<py::ssize_t>(slice.num_values())};
  py::array values(dense.dtype(), count);
  std::memcpy(values.mutable_data(), slice.values.data(), slice.values.size());
  py::dict result("rows"_a = slice.rows, "cols"_a = slice.cols, "block"_a = block,
                  "encoding"_a = encoding, "col_ptr"_a = to_array(slice.col_ptr),
                  "row_idx"_a = to_array(slice.row_idx), "row_ptr"_a = to_array(slice.row_ptr),
                  "col_idx"_a = to_array(slice.col_idx), "block_id"_a = to_array(slice.block_id),
                  "stored_bytes"_a = slice.stored_bytes());
  const std::vector<py::ssize_t> grid = {static_cast<py::ssize_t>(slice.num_blocks()), slice.bn,
                                         slice.bk};
  if (slice.bitmap) {
    result["mask"] = to_array(slice.mask).reshape({grid[0], grid[1], grid[2] / 8});
    result["block_ptr"] = to_array(slice.block_ptr);
    result["values"] = values;
  } else {
    result["values"] = values.reshape(grid);
  }
  return result;
}

template <class T>
std::vector<T> to_vector(const py::dict& packed, const char* name) {
  const auto array = py::array_t<int64_t, py::array::c_style>::ensure(packed[name]);
  FIPS_CHECK(static_cast<bool>(array), name, ": expected an array of integers");
  std::vector<T> values;
  for (py::ssize_t i = 0; i < array.size(); ++i) {
    const int64_t value = array.data()[i];
    FIPS_CHECK(value >= std::numeric_limits<T>::min() && value <= std::numeric_limits<T>::max(),
               name, ": entry ", i, " is ", value, ", out of range");
    values.push_back(static_cast<T>(value));
  }
  return values;
}

py::array unpack(const py::dict& packed) {
  const py::array values = py::array::ensure(packed["values"], py::array::c_style);
  FIPS_CHECK(static_cast<bool>(values), "values: expected an array of numbers");
  check_elements(values, "values");
  const auto block = packed["block"].cast<std::pair<int32_t, int32_t>>();
  fips::PackedSlice slice;
  slice.rows = packed["rows"].cast<int64_t>();
  slice.cols = packed["cols"].cast<int64_t>();
  slice.bk = block.first;
  slice.bn = block.second;
  slice.element_size = static_cast<int32_t>(values.itemsize());
  slice.bitmap = is_bitmap(packed["encoding"].cast<std::string>());
  slice.col_ptr = to_vector<int32_t>(packed, "col_ptr");
  slice.row_idx = to_vector<int32_t>(packed, "row_idx");
  if (slice.bitmap) {
    slice.mask = to_vector<uint8_t>(packed, "mask");
  }
  const auto* bytes = static_cast<const uint8_t*>(values.data());
  slice.values.assign(bytes, bytes + values.nbytes());
  fips::derive_index(slice);
  FIPS_CHECK(slice.bitmap || slice.num_values() == slice.num_blocks() * slice.bk * slice.bn,
             "values: hold ", slice.num_values(), " numbers; ", slice.num_blocks(), " blocks of ",
             slice.bk, "x", slice.bn, " need ", slice.num_blocks() * slice.bk * slice.bn);
  const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(slice.rows),
                                          static_cast<py::ssize_t>(slice.cols)};
  py::array dense(values.dtype(), shape);
  fips::unpack(slice, dense.mutable_data());
  return dense;
}

py::dict cpu_features() {
  return py::dict("detected"_a = fips::cpu::isa_name(fips::cpu::detect_isa()),
                  "active"_a = fips::cpu::isa_name(fips::cpu::active_isa()));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Block-sparse packing and CPU facts without torch, on NumPy arrays.";
  m.attr("version") = FIPS_VERSION;
  m.def("pack", &pack, "dense"_a, "keep"_a, "block"_a = std::pair<int32_t, int32_t>(64, 64),
        "encoding"_a = "block",
        "Pack the kept entries of a [r, n] matrix of 2-, 4- or 8-byte elements; returns a dict of "
        "arrays.");
  m.def("unpack", &unpack, "packed"_a,
        "The dense [r, n] matrix of a dict made by pack; validates every index.");
  m.def("cpu_features", &cpu_features,
        "Detected and active instruction set (see FIPS_CPU_CAPABILITY).");
}
