#include "amx_plan.h"

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

// Where weights go: by column the step and the place in its tile's 64 of k, found once, because that takes divisions.
class Places {
 public:
  Places(const AmxPlan& plan, const std::vector<uint32_t>& order) : plan_(plan), columns_(order.size()) {
    for (size_t column = 0; column < order.size(); ++column) {
      const int64_t position = order[column] % plan.order.positions, channel = order[column] / plan.order.positions;
      const int64_t place = plan.order.place(channel, position);
      columns_[column] = {place / kTileColumns, static_cast<int>(place % kTileColumns)};
    }
  }

  // visit(row, entry, its line of a tile, its bit there) for every kept entry, row by row.
  template <typename Visit>
  void each(const SparseRows& matrix, Visit visit) const {
    for (int64_t row = 0; row < matrix.rows; ++row) {
      const int64_t in_group = row % plan_.rows, tile = plan_.index(row / plan_.rows, in_group / kTileLines);
      const int i = static_cast<int>(in_group % kTileLines);
      for (uint32_t entry = matrix.starts[row]; entry < matrix.starts[row + 1]; ++entry) {
        const auto [step, k] = columns_[matrix.column[entry]];
        const int64_t first_line = (tile + step) * kTileLines;
        plan_.order.left ? visit(row, entry, first_line + i, k) : visit(row, entry, first_line + k / 4, 4 * i + k % 4);
      }
    }
  }

 private:
  struct Column {
    int64_t step;
    int k;
  };
  const AmxPlan& plan_;
  std::vector<Column> columns_;
};

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
  std::frexp(largest * 1.004f, &exponent);
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
  places.each(matrix, [&](int64_t, uint32_t, int64_t line, int bit) {
    rises = rises && masks[line] >> bit == 0;
    masks[line] |= uint64_t{1} << bit;
  });
  std::vector<uint32_t> next(tiles * kTileLines);  // of each line, where its first value goes
  for (int64_t line = 0; line < tiles * kTileLines; ++line) {
    if (line % kTileLines == 0) starts[line / kTileLines] = plan.kept;
    next[line] = plan.kept;
    plan.kept += static_cast<uint32_t>(__builtin_popcountll(masks[line]));
  }
  std::vector<float> widened, factors(matrix.rows, 1);  // that make the weights of a row integers
  const float* floats = widen(values, widened);
  float* of_sums = plan.scales.at_least(groups * plan.tiles * kTileLines);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    float largest = 0;
    for (uint32_t entry = matrix.starts[row]; digits > 1 && entry < matrix.starts[row + 1]; ++entry)
      largest = std::max(largest, std::fabs(floats[matrix.value_index(entry)]));
    if (digits > 1) factors[row] = digit_scale(largest);
    of_sums[row / plan.rows * plan.tiles * kTileLines + row % plan.rows] = scales.of(row) / factors[row] * (digits > 1 ? 1 << 16 : 1);
  }
  int8_t* stored = plan.values.at_least(int64_t{digits} * plan.kept);
  places.each(matrix, [&](int64_t row, uint32_t entry, int64_t line, int bit) {
    const int before = rises ? 0 : __builtin_popcountll(masks[line] & ((uint64_t{1} << bit) - 1));
    const int32_t whole = static_cast<int32_t>(std::nearbyint(floats[matrix.value_index(entry)] * factors[row]));
    int8_t* at = stored + next[line] + before;
    if (digits == 1) {
      *at = static_cast<int8_t>(whole);
    } else {
      const int32_t bytes = (whole + 0x8080) ^ 0x8080;
      for (int d = 0; d < kDigits; ++d) at[int64_t{d} * plan.kept] = static_cast<int8_t>(bytes >> 8 * (kDigits - 1 - d));
    }
    if (rises) ++next[line];
  });
  return plan;
}

}  // namespace nmconvert
