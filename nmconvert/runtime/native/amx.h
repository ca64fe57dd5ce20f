// Products on the matrix unit of Intel's servers (AMX), which multiplies tiles of bfloat16 and adds in float, for weights that
// bfloat16 holds: those that a file stores as such, or as int8 with a scale for each row.
//
// An input is the sum of three bfloat16, its parts, which have 8 bits of its fraction each, so that three products on the unit
// are as exact as one of floats. They take half the time of one on vectors, although the zeros of a pattern are multiplied, too:
// weights stay compressed, and are unpacked tile by tile into the cache. An input that is infinite becomes NaN in the output.
//
// Weights in float, which are three parts themselves, would take six products. That was tried, and with the unit's clock under
// load it is no faster than the kept weights on vectors: both 1.52 of dense for a BERT at 2:4, and less beside a neighbour.
#pragma once

#include <cstdint>

namespace nmconvert {

constexpr int kParts = 3;            // of an input, the largest first
constexpr int kTileLines = 16;       // of a tile, each of 64 bytes
constexpr int kTileColumns = 32;     // bfloat16 in a line
constexpr int kTileSize = kTileLines * kTileColumns;

// A left tile is [16 rows][32 columns of k], a right one [16 pairs of k][16 columns][2], and their product floats [16][16].
// Weights are on one side, inputs on the other.
struct AmxJob {
  const uint32_t* masks;    // of the first weight tile of a plan (amx_plan.h)
  const uint32_t* starts;
  const uint16_t* values;   // of the plan
  const void* inputs;       // the first part of the first tile
  int64_t part;             // bytes from part to part
  int64_t line;             // bytes from line to line
  int64_t tile;             // bytes from tile to tile
  const int64_t* offsets;   // [steps]: bytes to what a step reads
  int64_t steps;
  const float* start;       // what is added to, or null: of the first product
  int64_t start_line, start_left, start_right;  // floats from line to line, to the next left tile, to the next right one
  float* out;               // [16 · lefts][out_line]
  int64_t out_line;
  int64_t lefts, rights;    // tiles
};

struct Segment;  // isa.h; here from < 0 are zeros

struct Amx {
  // The parts of `count` floats, `part` elements apart, with zeros up to `padded`, a multiple of a tile's columns.
  void (*split)(const float* x, int64_t count, int64_t padded, uint16_t* parts, int64_t part);
  // Two channels, of which `odd` may be null, as pairs: parts[to + i] is of even[from + i] and odd[from + i].
  void (*split_pairs)(const float* even, const float* odd, const Segment* segments, int64_t count, uint32_t* parts, int64_t part);
  void (*multiply_left)(const AmxJob& job);   // weights on the left
  void (*multiply_right)(const AmxJob& job);  // weights on the right
  // Sums [rows][columns], columns a multiple of 16, times a scale and plus a bias (or null) for each row or each column.
  void (*scale)(float* sums, int64_t rows, int64_t columns, const float* scales, const float* bias, bool by_row);
};

// Null where the compiler does not know the unit.
const Amx* amx_loops();

}  // namespace nmconvert
