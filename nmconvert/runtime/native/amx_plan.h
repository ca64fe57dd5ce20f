// Kept entries in the order in which the matrix unit's tiles are unpacked.
#pragma once

#include <vector>

#include "amx.h"
#include "matrix.h"
#include "memory.h"

namespace nmconvert {

// Where a column of the weight stands: a line of inputs holds four channels, those at one kernel position follow one another, and
// sixteen lines are a step.
struct AmxOrder {
  bool left;  // weights are left tiles, as convolutions take them, or right ones, as linear layers do
  int64_t channels, positions = 1;

  int64_t quads() const { return (channels + 3) / 4; }
  int64_t lines() const { return positions * quads(); }
  int64_t steps() const { return (lines() + kTileLines - 1) / kTileLines; }
  int64_t place(int64_t channel, int64_t position) const { return 4 * position * quads() + channel; }
};

// The digits of weights (amx.h); none where sums of so many columns may be too large, or a weight is not finite.
int weight_digits(const Constant& values, int64_t columns);

struct AmxPlan {
  AmxOrder order;
  int64_t rows = 0, tiles = 0;  // of one group; a tile has 16 rows
  int digits = 0;
  uint32_t kept = 0;        // entries
  Buffer<uint64_t> masks;   // [group][tile][step][line]: a bit for each of the 64 entries
  Buffer<uint32_t> starts;  // [group][tile][step]: kept entries before
  Buffer<int8_t> values;    // [digit][kept], in the order of the masks' bits
  Buffer<float> scales;     // [group][16 · tiles]: what the sums of a row are multiplied by

  int64_t index(int64_t group, int64_t tile) const { return (group * tiles + tile) * order.steps(); }
};

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int digits,
                 const AmxOrder& order);

}  // namespace nmconvert
