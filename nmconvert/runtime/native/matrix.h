// A sparse weight as the kernels see it: rows of kept entries, decoded from values and mask as packing.py specifies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace nmconvert {

// A node that contradicts itself, when the session is made, or inputs that do not fit it, at a run.
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

// Sets bits from `at` on. A word is shifted twice, because a shift by all of its 64 bits is undefined.
inline void set_bits(uint64_t* bits, int64_t at, uint64_t word) {
  bits[at / 64] |= word << at % 64;
  bits[at / 64 + 1] |= word >> 1 >> (63 - at % 64);
}

// Rows of kept entries: a bit for every weight, set where it is kept, row after row. Row r holds entries [starts[r], starts[r + 1]),
// whose columns rise; these are numbered in the order of the file, and `order[column]` is the place of one in the operator's own.
struct SparseRows {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<uint64_t> bits;  // bit row · columns + column; a word more, which piece() may read
  std::vector<uint32_t> starts;
  std::vector<uint32_t> source;  // which of the values stands there; empty where entry i is value i
  std::vector<uint32_t> order;

  uint32_t kept() const { return starts.back(); }
  uint32_t value_index(uint32_t entry) const { return source.empty() ? entry : source[entry]; }

  // The bits of `count` columns from `first` on, at most 64.
  uint64_t piece(int64_t row, int64_t first, int64_t count) const {
    const int64_t at = row * columns + first;
    const uint64_t* word = bits.data() + at / 64;
    return (word[0] >> at % 64 | word[1] << 1 << (63 - at % 64)) & ~uint64_t{0} >> (64 - count);
  }

  // Calls visit(entry, column) for what a row keeps in columns [first, end); `entry` is the first of these.
  template <typename Visit>
  void each_entry(int64_t row, int64_t first, int64_t end, uint32_t entry, Visit visit) const {
    for (; first < end; first += 64)
      for (uint64_t left = piece(row, first, std::min<int64_t>(64, end - first)); left; left &= left - 1)
        visit(entry++, static_cast<uint32_t>(first + __builtin_ctzll(left)));
  }
  template <typename Visit>
  void each_entry(int64_t row, Visit visit) const {
    each_entry(row, 0, columns, starts[row], visit);
  }
};

// What the values of a row are multiplied by.
struct RowScales {
  const float* of_rows;  // null where the rows have none
  float all;

  RowScales(const Packed& packed, float factor) : of_rows(static_cast<const float*>(packed.scale.data)), all(factor) {}
  bool any() const { return of_rows || all != 1; }
  float of(int64_t row) const { return of_rows ? of_rows[row] * all : all; }
};

// The product of positive dimensions. Throws InvalidNode where one is not, or it is beyond what offsets of 32 bits reach.
int64_t checked_size(const std::vector<int64_t>& shape, const char* name);

// Decodes `packed`. `is_row[d]` says whether dimension d of the dense shape counts rows (output channels).
// Throws InvalidNode where the arrays and attributes contradict each other.
SparseRows decode(const Packed& packed, const std::vector<bool>& is_row);

}  // namespace nmconvert
