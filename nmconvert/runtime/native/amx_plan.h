// Kept entries in the order in which the matrix unit's tiles are unpacked.
#pragma once

#include <vector>

#include "amx.h"
#include "matrix.h"
#include "memory.h"

namespace nmconvert {

// Where a column of the weight stands: a step multiplies 32 input channels at one kernel position, and the positions follow one
// another, because they read the same cache lines.
struct AmxOrder {
  bool left;  // weights are left tiles, as convolutions take them, or right ones, as linear layers do
  int64_t channels, positions = 1;

  int64_t channel_tiles() const { return (channels + kTileColumns - 1) / kTileColumns; }
  int64_t steps() const { return positions * channel_tiles(); }
};

// Whether bfloat16 holds all values of a type.
bool fits_bfloat16(int type);

struct AmxPlan {
  AmxOrder order;
  int64_t rows = 0, tiles = 0;  // of one group; a tile has 16 rows
  Buffer<uint32_t> masks;       // [group][tile][step][line]: a bit for each of the 32 entries
  Buffer<uint32_t> starts;      // [group][tile][step] and one more: kept entries before
  Buffer<uint16_t> values;      // bfloat16, in the order of the masks' bits
  bool scaled = false;          // sums are multiplied by a scale of each row
  Buffer<float> scales;         // [group][16 · tiles]

  int64_t index(int64_t group, int64_t tile) const { return (group * tiles + tile) * order.steps(); }
};

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, const AmxOrder& order);

}  // namespace nmconvert
