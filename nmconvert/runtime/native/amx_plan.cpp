#include "amx_plan.h"

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

// Of a weight: its tile and step, and the line and bit there.
struct Place {
  int64_t tile;
  int line, bit;
};

Place place_of(const AmxPlan& plan, int64_t row, int64_t column) {
  const AmxOrder& order = plan.order;
  const int64_t position = column % order.positions, channel = column / order.positions, in_group = row % plan.rows;
  const int64_t step = channel / kTileColumns * order.positions + position;
  const int i = static_cast<int>(in_group % kTileLines), k = static_cast<int>(channel % kTileColumns);
  const int64_t tile = plan.index(row / plan.rows, in_group / kTileLines) + step;
  return order.left ? Place{tile, i, k} : Place{tile, k / 2, 2 * i + k % 2};
}

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
  for (int64_t row = 0; row < matrix.rows; ++row)
    for (uint32_t entry = matrix.starts[row]; entry < matrix.starts[row + 1]; ++entry) {
      const Place place = place_of(plan, row, matrix.order[matrix.column[entry]]);
      masks[place.tile * kTileLines + place.line] |= 1u << place.bit;
    }
  std::vector<uint16_t> before(tiles * kTileLines);  // kept entries of a tile before each of its lines
  for (int64_t tile = 0; tile < tiles; ++tile) {
    uint32_t kept = 0;
    for (int line = 0; line < kTileLines; ++line) {
      before[tile * kTileLines + line] = static_cast<uint16_t>(kept);
      kept += static_cast<uint32_t>(__builtin_popcount(masks[tile * kTileLines + line]));
    }
    starts[tile + 1] = starts[tile] + kept;
  }
  plan.scaled = scales.any();
  if (plan.scaled) {
    float* of_rows = plan.scales.at_least(groups * plan.tiles * kTileLines);
    for (int64_t row = 0; row < matrix.rows; ++row) of_rows[row / plan.rows * plan.tiles * kTileLines + row % plan.rows] = scales.of(row);
  }
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  uint16_t* kept = plan.values.at_least(starts[tiles]);
  for (int64_t row = 0; row < matrix.rows; ++row)
    for (uint32_t entry = matrix.starts[row]; entry < matrix.starts[row + 1]; ++entry) {
      const Place place = place_of(plan, row, matrix.order[matrix.column[entry]]);
      const int64_t line = place.tile * kTileLines + place.line;
      const int in_line = __builtin_popcount(masks[line] & ((1u << place.bit) - 1));
      kept[starts[place.tile] + before[line] + in_line] = float_to_bfloat(floats[matrix.value_index(entry)]);
    }
  return plan;
}

}  // namespace nmconvert
