// A sparse weight as the kernels see it: rows of kept entries, decoded from values and mask as packing.py specifies.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace nmconvert {

// A node that contradicts itself: an error when the session is made.
struct InvalidNode : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A tensor of the file: its bytes and its shape.
struct Constant {
  const void* data = nullptr;
  int type = 0;  // ONNX element type
  std::vector<int64_t> shape;
  int64_t size() const;
};

struct Packed {
  Constant values, mask, table;
  Constant scale;  // of every row, float32; of no type where the values are the weights themselves
  std::vector<int64_t> shape, permuted, perm, code_shape;
};

// Rows of kept entries. Row r holds entries [starts[r], starts[r + 1]); columns are numbered in the order of the file, so
// that a row's columns rise; `order[column]` is the place of that column in the operator's own order.
struct SparseRows {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<uint32_t> starts;
  std::vector<uint32_t> column;
  std::vector<uint32_t> source;  // which of the values stands there; empty where entry i is value i
  std::vector<uint32_t> order;

  uint32_t value_index(uint32_t entry) const { return source.empty() ? entry : source[entry]; }
};

// What the values of a row are multiplied by.
struct RowScales {
  const float* of_rows;  // null where the rows have none
  float all;

  RowScales(const Packed& packed, float factor) : of_rows(static_cast<const float*>(packed.scale.data)), all(factor) {}
  bool any() const { return of_rows || all != 1; }
  float of(int64_t row) const { return of_rows ? of_rows[row] * all : all; }
};

// Decodes `packed`. `is_row[d]` says whether dimension d of the dense shape counts rows (output channels).
// Throws InvalidNode where the arrays and attributes contradict each other.
SparseRows decode(const Packed& packed, const std::vector<bool>& is_row);

}  // namespace nmconvert
