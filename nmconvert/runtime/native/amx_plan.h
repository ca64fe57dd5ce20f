// Kept entries in the order in which the matrix unit's tiles are unpacked.
#pragma once

#include <vector>

#include "amx.h"
#include "matrix.h"
#include "memory.h"

namespace nmconvert {

// Where a column of the weight stands: a step multiplies 32 input channels at one kernel position.
struct AmxOrder {
  bool left;  // weights are left tiles, as convolutions take them, or right ones, as linear layers do
  int64_t channels, positions = 1;

  int64_t channel_tiles() const { return (channels + kTileColumns - 1) / kTileColumns; }
  int64_t steps() const { return positions * channel_tiles(); }
};

// Parts that hold stored values whole: of a type's fraction each has 8 bits.
int amx_parts(int type);

struct AmxPlan {
  AmxOrder order;
  int64_t rows = 0, tiles = 0;  // of one group; a tile has 16 rows
  Buffer<uint32_t> masks;       // [group][tile][step][line]: a bit for each of the 32 entries
  Buffer<uint32_t> starts;      // [group][tile][step] and one more: kept entries before
  int of_weight = kParts;       // parts of a weight
  Buffer<uint16_t> parts;       // of every tile the first parts of what is kept, then the second and the third
  bool scaled = false;          // weights of fewer parts are multiplied by a scale at the end
  Buffer<float> scales;         // [group][16 · tiles]

  int64_t index(int64_t group, int64_t tile) const { return (group * tiles + tile) * order.steps(); }
};

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, const AmxOrder& order);

}  // namespace nmconvert
