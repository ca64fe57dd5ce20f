#include "amx_plan.h"

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

// Where weights go: by column the step and the place in its tile's 32 of k, found once, because that takes divisions.
class Places {
 public:
  Places(const AmxPlan& plan, const std::vector<uint32_t>& order) : plan_(plan), columns_(order.size()) {
    for (size_t column = 0; column < order.size(); ++column) {
      const int64_t position = order[column] % plan.order.positions, channel = order[column] / plan.order.positions;
      columns_[column] = {channel / kTileColumns * plan.order.positions + position, static_cast<int>(channel % kTileColumns)};
    }
  }

  // visit(entry, its line of a tile, its bit there) for every kept entry, row by row.
  template <typename Visit>
  void each(const SparseRows& matrix, Visit visit) const {
    for (int64_t row = 0; row < matrix.rows; ++row) {
      const int64_t in_group = row % plan_.rows, tile = plan_.index(row / plan_.rows, in_group / kTileLines);
      const int i = static_cast<int>(in_group % kTileLines);
      for (uint32_t entry = matrix.starts[row]; entry < matrix.starts[row + 1]; ++entry) {
        const auto [step, k] = columns_[matrix.column[entry]];
        const int64_t first_line = (tile + step) * kTileLines;
        plan_.order.left ? visit(entry, first_line + i, k) : visit(entry, first_line + k / 2, 2 * i + k % 2);
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

bool fits_bfloat16(int type) { return type == ort::kInt8 || type == ort::kBfloat16; }

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, const AmxOrder& order) {
  AmxPlan plan;
  plan.order = order;
  plan.rows = matrix.rows / groups;
  plan.tiles = (plan.rows + kTileLines - 1) / kTileLines;
  const int64_t tiles = groups * plan.tiles * order.steps();
  uint32_t* masks = plan.masks.at_least(tiles * kTileLines);
  uint32_t* starts = plan.starts.at_least(tiles + 1);
  const Places places(plan, matrix.order);
  bool rises = true;  // bits of a line come in their order, so that they need not be counted
  places.each(matrix, [&](uint32_t, int64_t line, int bit) {
    rises = rises && masks[line] >> bit == 0;
    masks[line] |= 1u << bit;
  });
  std::vector<uint32_t> next(tiles * kTileLines);  // of each line, where its first value goes
  uint32_t kept = 0;
  for (int64_t line = 0; line < tiles * kTileLines; ++line) {
    if (line % kTileLines == 0) starts[line / kTileLines] = kept;
    next[line] = kept;
    kept += static_cast<uint32_t>(__builtin_popcount(masks[line]));
  }
  starts[tiles] = kept;
  plan.scaled = scales.any();
  if (plan.scaled) {
    float* of_rows = plan.scales.at_least(groups * plan.tiles * kTileLines);
    for (int64_t row = 0; row < matrix.rows; ++row) of_rows[row / plan.rows * plan.tiles * kTileLines + row % plan.rows] = scales.of(row);
  }
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  uint16_t* stored = plan.values.at_least(kept);
  places.each(matrix, [&](uint32_t entry, int64_t line, int bit) {
    const int before = rises ? 0 : __builtin_popcount(masks[line] & ((1u << bit) - 1));
    stored[next[line] + before] = float_to_bfloat(floats[matrix.value_index(entry)]);
    if (rises) ++next[line];
  });
  return plan;
}

}  // namespace nmconvert
