#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "ort_abi.h"

namespace nmconvert {
namespace {

constexpr int64_t kMaxEntries = int64_t{1} << 31;

// The product of positive dimensions, at most kMaxEntries.
int64_t checked_size(const std::vector<int64_t>& shape, const char* name) {
  int64_t size = 1;
  for (int64_t dimension : shape) {
    if (dimension < 1 || dimension > kMaxEntries || size > kMaxEntries / dimension)
      throw InvalidNode(std::string(name) + " has dimension " + std::to_string(dimension) + ", which is out of range");
    size *= dimension;
  }
  return size;
}

std::string count(int64_t n) { return std::to_string(n); }

[[noreturn]] void throw_surplus(int64_t values) {
  throw InvalidNode("the mask keeps more weights than there are values (" + count(values) + ")");
}

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

// Calls keep(k) for every kept entry k of the flattened matrix, in order.
template <typename Keep>
void each_kept(const Packed& packed, const Coding& coding, int64_t size, Keep keep) {
  const uint8_t* mask = static_cast<const uint8_t*>(packed.mask.data);
  // The kept columns of every code, so that zeros cost nothing.
  std::vector<uint16_t> kept, first(coding.codes + 1, 0);
  for (int64_t code = 0; code < coding.codes; ++code) {
    for (int64_t i = 0; i < coding.width; ++i)
      if (coding.table[code * coding.width + i]) kept.push_back(static_cast<uint16_t>(i));
    if (kept.size() > 0xffff) throw InvalidNode("the mask table is too large");
    first[code + 1] = static_cast<uint16_t>(kept.size());
  }
  std::vector<uint8_t> bits(coding.width);
  for (int64_t base = 0; base < size; base += coding.width, mask += coding.parts) {
    for (int64_t part = 0; part < coding.parts; ++part)
      if (mask[part] >= coding.codes) throw InvalidNode("mask code " + count(mask[part]) + " is outside its table");
    if (coding.parts == 1) {
      for (int i = first[*mask]; i < first[*mask + 1]; ++i)
        if (base + kept[i] < size) keep(base + kept[i]);
      continue;
    }
    std::memset(bits.data(), 0, bits.size());
    for (int64_t part = 0; part < coding.parts; ++part)
      for (int i = first[mask[part]]; i < first[mask[part] + 1]; ++i)
        if (bits[kept[i]]++) throw InvalidNode("the mask names a weight twice");
    for (int64_t i = 0; i < coding.width && base + i < size; ++i)
      if (bits[i]) keep(base + i);
  }
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

std::vector<uint32_t> native_order(const Walk& walk) {
  std::vector<uint32_t> order(walk.columns);
  const int64_t size = std::accumulate(walk.extent.begin(), walk.extent.end(), int64_t{1}, std::multiplies<int64_t>());
  if (walk.rows_lead) {
    for (int64_t column = 0; column < walk.columns; ++column)
      order[column] = static_cast<uint32_t>(along(walk.extent, walk.order_step, column));
    return order;
  }
  for (int64_t flat = 0; flat < size; ++flat)
    order[along(walk.extent, walk.column_step, flat)] = static_cast<uint32_t>(along(walk.extent, walk.order_step, flat));
  return order;
}

void sort_by_row(SparseRows& matrix, const std::vector<uint32_t>& row) {
  std::vector<uint32_t> next(matrix.starts.begin(), matrix.starts.end() - 1), column(row.size());
  matrix.source.resize(row.size());
  for (size_t i = 0; i < row.size(); ++i) {
    const uint32_t to = next[row[i]]++;
    column[to] = matrix.column[i];
    matrix.source[to] = static_cast<uint32_t>(i);
  }
  matrix.column = std::move(column);
}

}  // namespace

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
  matrix.column.resize(kept);
  uint32_t* const begin = matrix.column.data();
  uint32_t *next = begin, *const end = begin + kept;
  if (walk.rows_lead) {
    int64_t row_end = walk.columns;
    auto ended = matrix.starts.begin() + 1;
    each_kept(packed, coding, size, [&](int64_t flat) {
      if (next == end) throw_surplus(kept);
      for (; flat >= row_end; row_end += walk.columns) *ended++ = static_cast<uint32_t>(next - begin);
      *next++ = static_cast<uint32_t>(flat - (row_end - walk.columns));
    });
    std::fill(ended, matrix.starts.end(), static_cast<uint32_t>(next - begin));
  } else {
    std::vector<uint32_t> row;
    each_kept(packed, coding, size, [&](int64_t flat) {
      if (next == end) throw_surplus(kept);
      row.push_back(static_cast<uint32_t>(along(walk.extent, walk.row_step, flat)));
      *next++ = static_cast<uint32_t>(along(walk.extent, walk.column_step, flat));
      ++matrix.starts[row.back() + 1];
    });
    for (int64_t r = 0; r < matrix.rows; ++r) matrix.starts[r + 1] += matrix.starts[r];
    if (next == end) sort_by_row(matrix, row);
  }
  if (next != end)
    throw InvalidNode("the mask keeps " + count(next - begin) + " weights, but there are " + count(kept) + " values");
  matrix.order = native_order(walk);
  return matrix;
}

}  // namespace nmconvert
