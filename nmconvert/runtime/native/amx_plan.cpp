#include "amx_plan.h"

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

// Where weights go: by column a line of the tiles of its row and a bit there, found once, because that takes divisions.
class Places {
 public:
  Places(const AmxPlan& plan, const std::vector<uint32_t>& order) : plan_(plan), columns_(order.size()) {
    for (size_t column = 0; column < order.size(); ++column) {
      const int64_t position = order[column] % plan.order.positions, channel = order[column] / plan.order.positions;
      const int64_t place = plan.order.place(channel, position), step = place / kTileColumns, k = place % kTileColumns;
      columns_[column] = plan.order.left ? Column{step * kTileLines, k} : Column{step * kTileLines + k / 4, k % 4};
    }
  }

  // visit(its line, its bit there) for every kept entry of a row.
  template <typename Visit>
  void each(const SparseRows& matrix, int64_t row, Visit visit) const {
    const int64_t in_group = row % plan_.rows, i = in_group % kTileLines;
    const int64_t first_line = plan_.index(row / plan_.rows, in_group / kTileLines) * kTileLines + (plan_.order.left ? i : 0);
    const int64_t first_bit = plan_.order.left ? 0 : 4 * i;
    for (uint32_t entry = matrix.starts[row]; entry < matrix.starts[row + 1]; ++entry) {
      const Column& column = columns_[matrix.column[entry]];
      visit(first_line + column.line, first_bit + column.bit);
    }
  }

 private:
  struct Column {
    int64_t line, bit;
  };
  const AmxPlan& plan_;
  std::vector<Column> columns_;
};

// The weights of a row as integers, and the power of two that makes them such.
float make_whole(const SparseRows& matrix, const float* values, int64_t row, int digits, std::vector<int32_t>& whole) {
  const uint32_t first = matrix.starts[row], count = matrix.starts[row + 1] - first;
  whole.resize(count);
  float largest = 0;
  for (uint32_t i = 0; digits > 1 && i < count; ++i) largest = std::max(largest, std::fabs(values[matrix.value_index(first + i)]));
  const float scale = digits > 1 ? digit_scale(largest) : 1;
  for (uint32_t i = 0; i < count; ++i) {
    const float value = values[matrix.value_index(first + i)] * scale;
    whole[i] = static_cast<int32_t>(value + std::copysign(0.5f, value));
  }
  return scale;
}

}  // namespace

int weight_digits(const Constant& values, int64_t columns) {
  constexpr int64_t kLargest = int64_t{kDigits} << 14;  // of a column's part in the lowest sum
  if (columns > INT32_MAX / kLargest) return 0;
  if (values.type == ort::kInt8) return 1;
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  return std::all_of(floats, floats + values.size(), [](float value) { return std::isfinite(value); }) ? kDigits : 0;
}

float digit_scale(float largest) {
  constexpr int kHighest = 120;  // so that its inverse is a normal float
  int exponent;                  // the next power of two, of one that leaves room for three digits of 127
  std::frexp(largest * 1.004, &exponent);
  return std::ldexp(1.f, largest > 0 ? std::min(23 - exponent, kHighest) : 0);
}

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int digits,
                 const AmxOrder& order) {
  AmxPlan plan;
  plan.order = order;
  plan.rows = matrix.rows / groups;
  plan.tiles = (plan.rows + kTileLines - 1) / kTileLines;
  plan.digits = digits;
  const int64_t tiles = groups * plan.tiles * order.steps();
  uint64_t* masks = plan.masks.at_least(tiles * kTileLines);
  uint32_t* starts = plan.starts.at_least(tiles);
  const Places places(plan, matrix.order);
  bool rises = true;  // bits of a line come in their order, so that they need not be counted
  for (int64_t row = 0; row < matrix.rows; ++row)
    places.each(matrix, row, [&](int64_t line, int64_t bit) {
      rises = rises && masks[line] >> bit == 0;
      masks[line] |= uint64_t{1} << bit;
    });
  std::vector<uint32_t> next(tiles * kTileLines);  // of each line, where its first value goes
  for (int64_t line = 0; line < tiles * kTileLines; ++line) {
    if (line % kTileLines == 0) starts[line / kTileLines] = plan.kept;
    next[line] = plan.kept;
    plan.kept += static_cast<uint32_t>(__builtin_popcountll(masks[line]));
  }
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  float* of_sums = plan.scales.at_least(groups * plan.tiles * kTileLines);
  int8_t* stored = plan.values.at_least(int64_t{digits} * plan.kept);
  std::vector<int32_t> whole;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const float scale = make_whole(matrix, floats, row, digits, whole);
    of_sums[row / plan.rows * plan.tiles * kTileLines + row % plan.rows] = scales.of(row) / scale * (digits > 1 ? 1 << 16 : 1);
    const int32_t* value = whole.data();
    places.each(matrix, row, [&](int64_t line, int64_t bit) {
      const int before = rises ? 0 : __builtin_popcountll(masks[line] & ((uint64_t{1} << bit) - 1));
      int8_t* at = stored + next[line] + before;
      next[line] += rises;
      const int32_t bytes = digits > 1 ? (*value + 0x8080) ^ 0x8080 : *value * (1 << 16);  // the highest digit first
      ++value;
      for (int d = 0; d < digits; ++d) at[int64_t{d} * plan.kept] = static_cast<int8_t>(bytes >> (16 - 8 * d));
    });
  }
  return plan;
}

}  // namespace nmconvert
