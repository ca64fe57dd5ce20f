#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ort_abi.h"

namespace nmconvert {
namespace {

constexpr int64_t kMaxEntries = int64_t{1} << 31;
constexpr int64_t kLargestGroup = 32;  // weights, of which each group keeps one or more (packing.py): a small file is no large weight

std::string count(int64_t n) { return std::to_string(n); }

struct Coding {
  int64_t parts, width, codes;
  const uint8_t* table;
};

Coding check_coding(const Packed& packed, int64_t size) {
  const std::vector<int64_t>& code = packed.code_shape;
  if (code.size() != 3 || code[1] < 1 || code[1] > 64 || code[2] < 1 || code[2] > 4096)
    throw InvalidNode("code_shape is not [-1, parts, width]");
  const std::vector<int64_t>& table = packed.table.shape;
  if (table.size() != 2 || table[1] != code[2] || table[0] < 1 || table[0] > 256)
    throw InvalidNode("the mask table does not have the width of code_shape");
  const Coding coding{code[1], code[2], table[0], static_cast<const uint8_t*>(packed.table.data)};
  for (int64_t i = 0; i < coding.codes * coding.width; ++i)
    if (coding.table[i] > 1) throw InvalidNode("the mask table holds something other than 0 and 1");
  const int64_t expected = (size + coding.width - 1) / coding.width * coding.parts;
  if (packed.mask.shape.size() != 1 || packed.mask.size() != expected)
    throw InvalidNode("the mask has " + count(packed.mask.size()) + " codes, " + count(expected) + " are needed");
  if (packed.values.shape.size() != 1) throw InvalidNode("values is not one-dimensional");
  return coding;
}

// The mask as bits in the order of the file: `size` of them, and a word more.
std::vector<uint64_t> decode_mask(const Packed& packed, const Coding& coding, int64_t size) {
  const int64_t words = (coding.width + 63) / 64;  // of a group of `width` weights
  std::vector<uint64_t> of_codes(coding.codes * words), group(words);
  for (int64_t code = 0; code < coding.codes; ++code)
    for (int64_t i = 0; i < coding.width; ++i)
      of_codes[code * words + i / 64] |= static_cast<uint64_t>(coding.table[code * coding.width + i]) << i % 64;
  std::vector<uint64_t> bits(size / 64 + words + 2);
  const uint8_t* mask = static_cast<const uint8_t*>(packed.mask.data);
  for (int64_t base = 0; base < size; base += coding.width) {
    std::fill(group.begin(), group.end(), 0);
    for (int64_t part = 0; part < coding.parts; ++part, ++mask) {
      if (*mask >= coding.codes) throw InvalidNode("mask code " + count(*mask) + " is outside its table");
      for (int64_t word = 0; word < words; ++word) {
        const uint64_t added = of_codes[*mask * words + word];
        if (group[word] & added) throw InvalidNode("the mask names a weight twice");
        group[word] |= added;
      }
    }
    for (int64_t word = 0; word < words; ++word) set_bits(bits.data(), base + 64 * word, group[word]);
  }
  bits.resize(size / 64 + 2);
  bits[size / 64] &= (uint64_t{1} << size % 64) - 1;
  bits[size / 64 + 1] = 0;
  return bits;
}

// What one step along each dimension of `permuted` adds to the row and to the operator's own column.
struct Walk {
  std::vector<int64_t> extent, row_step, column_step, order_step;
  int64_t rows = 1, columns = 1;
  bool rows_lead = true;
};

Walk plan_walk(const Packed& packed, const std::vector<bool>& is_row) {
  const size_t rank = packed.shape.size();
  if (is_row.size() != rank || packed.permuted.size() != rank || packed.perm.size() != rank)
    throw InvalidNode("shape, permuted and perm do not have the rank of the weight");
  std::vector<int64_t> place(rank, -1);  // of each dimension of `permuted`, its place in `shape`
  for (size_t d = 0; d < rank; ++d) {
    const int64_t from = packed.perm[d];
    if (from < 0 || from >= static_cast<int64_t>(rank) || place[from] >= 0) throw InvalidNode("perm is not a permutation");
    if (packed.permuted[from] != packed.shape[d]) throw InvalidNode("permuted, transposed by perm, is not the shape");
    place[from] = static_cast<int64_t>(d);
  }
  Walk walk;
  std::vector<int64_t> native(rank);  // steps in the operator's own order
  for (size_t d = rank; d-- > 0;) {
    int64_t& total = is_row[d] ? walk.rows : walk.columns;
    native[d] = total;
    total *= packed.shape[d];
  }
  walk.extent = packed.permuted;
  walk.row_step.assign(rank, 0);
  walk.column_step.assign(rank, 0);
  walk.order_step.assign(rank, 0);
  int64_t column_step = 1;
  for (size_t p = rank; p-- > 0;) {
    const bool row = is_row[place[p]];
    (row ? walk.row_step : walk.column_step)[p] = row ? native[place[p]] : column_step;
    if (!row) {
      walk.order_step[p] = native[place[p]];
      column_step *= packed.permuted[p];
    }
  }
  // Rows that lead in their own order make the file's order row-major: nothing has to be sorted.
  int64_t expected = walk.rows;
  for (size_t p = 0; p < rank; ++p) {
    if (!is_row[place[p]]) continue;
    expected /= packed.permuted[p];
    walk.rows_lead = walk.rows_lead && walk.row_step[p] == expected;
    for (size_t q = 0; q < p; ++q) walk.rows_lead = walk.rows_lead && is_row[place[q]];
  }
  return walk;
}

// A scale belongs to a row of the file, and has to be one that no weight is lost by.
void check_scale(const Constant& scale, const Walk& walk) {
  if (scale.type != ort::kFloat) throw InvalidNode("the scale has to be float32");
  if (scale.shape.size() != 1 || scale.size() != walk.rows)
    throw InvalidNode("there are " + count(scale.size()) + " scales, " + count(walk.rows) + " rows need one each");
  if (!walk.rows_lead) throw InvalidNode("permuted and perm do not put the rows first, which have a scale each");
  const float* scales = static_cast<const float*>(scale.data);
  for (int64_t row = 0; row < walk.rows; ++row)
    if (!(scales[row] > 0 && std::isfinite(scales[row])))
      throw InvalidNode("the scale of row " + count(row) + " is " + std::to_string(scales[row]) + ", not a positive number");
}

// Sum over dimensions of (coordinate of `flat`) × step.
int64_t along(const std::vector<int64_t>& extent, const std::vector<int64_t>& step, int64_t flat) {
  int64_t at = 0;
  for (size_t d = extent.size(); d-- > 0; flat /= extent[d]) at += flat % extent[d] * step[d];
  return at;
}

// Of every column in the order of the file, its place in the operator's own.
std::vector<uint32_t> native_order(const Walk& walk) {
  std::vector<int64_t> extent = walk.extent;  // of a single row
  for (size_t d = 0; d < extent.size(); ++d)
    if (walk.row_step[d]) extent[d] = 1;
  std::vector<uint32_t> order(walk.columns);
  for (int64_t flat = 0; flat < walk.columns; ++flat)
    order[along(extent, walk.column_step, flat)] = static_cast<uint32_t>(along(extent, walk.order_step, flat));
  return order;
}

// Rows that follow each other in the file.
void count_rows(SparseRows& matrix) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    uint32_t kept = matrix.starts[row];
    for (int64_t first = 0; first < matrix.columns; first += 64)
      kept += static_cast<uint32_t>(__builtin_popcountll(matrix.piece(row, first, std::min<int64_t>(64, matrix.columns - first))));
    matrix.starts[row + 1] = kept;
  }
}

// Rows whose weights are scattered in the file, whose bits are `flat`: sets theirs, and for each entry which value it is.
void sort_by_row(SparseRows& matrix, const Walk& walk, const std::vector<uint64_t>& flat) {
  std::vector<uint32_t> rows;
  for (size_t word = 0; word < flat.size(); ++word)
    for (uint64_t left = flat[word]; left; left &= left - 1) {
      const int64_t at = static_cast<int64_t>(64 * word) + __builtin_ctzll(left);
      const int64_t row = along(walk.extent, walk.row_step, at), place = row * matrix.columns + along(walk.extent, walk.column_step, at);
      matrix.bits[place / 64] |= uint64_t{1} << place % 64;
      ++matrix.starts[row + 1];
      rows.push_back(static_cast<uint32_t>(row));
    }
  std::partial_sum(matrix.starts.begin(), matrix.starts.end(), matrix.starts.begin());
  std::vector<uint32_t> next(matrix.starts.begin(), matrix.starts.end() - 1);
  matrix.source.resize(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) matrix.source[next[rows[i]]++] = static_cast<uint32_t>(i);
}

}  // namespace

int64_t checked_size(const std::vector<int64_t>& shape, const char* name) {
  int64_t size = 1;
  for (int64_t dimension : shape) {
    if (dimension < 1 || dimension > kMaxEntries || size > kMaxEntries / dimension)
      throw InvalidNode(std::string(name) + " has dimension " + std::to_string(dimension) + ", which is out of range");
    size *= dimension;
  }
  return size;
}

int64_t Constant::size() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

SparseRows decode(const Packed& packed, const std::vector<bool>& is_row) {
  const int64_t size = checked_size(packed.shape, "shape");
  if (checked_size(packed.permuted, "permuted") != size) throw InvalidNode("permuted does not have the size of shape");
  const Coding coding = check_coding(packed, size);
  const Walk walk = plan_walk(packed, is_row);
  if (packed.scale.type) check_scale(packed.scale, walk);
  const int64_t kept = packed.values.size();

  SparseRows matrix;
  matrix.rows = walk.rows;
  matrix.columns = walk.columns;
  matrix.starts.assign(walk.rows + 1, 0);
  if (kept > size) throw InvalidNode("there are more values than weights");
  if (kept < size / kLargestGroup) throw InvalidNode("there are " + count(kept) + " values for " + count(size) + " weights");
  std::vector<uint64_t> bits = decode_mask(packed, coding, size);
  int64_t masked = 0;
  for (const uint64_t word : bits) masked += __builtin_popcountll(word);
  if (masked != kept) throw InvalidNode("the mask keeps " + count(masked) + " weights, but there are " + count(kept) + " values");
  if (walk.rows_lead) {
    matrix.bits = std::move(bits);
    count_rows(matrix);
  } else {
    matrix.bits.resize(bits.size());
    sort_by_row(matrix, walk, bits);
  }
  matrix.order = native_order(walk);
  return matrix;
}

}  // namespace nmconvert
