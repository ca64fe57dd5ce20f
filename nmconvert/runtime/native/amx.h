// Products on the matrix unit of Intel's servers (AMX), which multiplies tiles of bytes and adds in 32 bits.
//
// A float becomes an integer of 23 bits and a sign, by a power of two that its token, image or row of weights shares; and this three
// digits of 8 bits, the first of which is the highest. Digits count from -128, not from 0, so that what is dropped is zero on average.
// A weight that is stored as int8 is one digit. Of the nine products of two floats' digits six count (Ozaki et al. 2012 split doubles
// so). Sums are exact; a product is uncertain by 2^-23 of the largest input times the largest weight, an output by about 1e-6 of the
// largest. Images that are not finite, or most of which would lose too many bits beside their largest pixel, take the vectors; a
// token that is not finite makes NaN.
//
// Zeros of a pattern are multiplied, too. Weights stay compressed, and are unpacked tile by tile into the cache.
#pragma once

#include <cstdint>

#include "isa.h"

namespace nmconvert {

constexpr int kDigits = 3;           // of a float, the highest first
constexpr int kTileLines = 16;       // of a tile, each of 64 bytes
constexpr int kTileColumns = 64;     // digits in a line
constexpr int kTileSize = kTileLines * kTileColumns;

// A left tile is [16 rows][64 columns of k], a right one [16 quads of k][16 columns][4], and their product is [16][16].
// Weights are on one side, inputs on the other.
struct AmxJob {
  const uint64_t* masks;    // of the first weight tile of a plan (amx_plan.h)
  const uint32_t* starts;
  const int8_t* values;     // of the plan
  int64_t kept;             // bytes of values from digit to digit
  const void* inputs;       // the first digit of the first tile
  int64_t digit;            // bytes from digit to digit
  int64_t line;             // bytes from line to line
  int64_t tile;             // bytes from tile to tile
  int64_t step;             // bytes from step to step
  int64_t steps;
  int8_t* unpacked;         // [steps + 1, at least four][digits of weights][kTileSize]: room for unpacked weights
  // out[i][j] = activation(clip(sum · line_scales[i] · column_scales[j] + bias + residual[i][j])), where the bias is of lines if weights
  // are on the left (and column_scales are not read), else of columns.
  const float *line_scales, *column_scales, *bias;
  const float* residual;    // strides of out, or null
  float low, high;
  Activation activation;
  float* out;               // [lines][out_line]
  int64_t out_line;
  int64_t lines, columns;   // that are written: of the last tiles perhaps not all
  int64_t lefts, rights;    // tiles
};

// What the scale of floats follows from.
struct Range {
  float largest = 0;  // of their absolute values; not finite where one of them is not
  float sum = 0;      // of their absolute values
};

// The power of two that makes floats up to `largest` integers of three digits.
float digit_scale(float largest);

struct Amx {
  Range (*range)(const float* x, int64_t count);
  // The digits of `count` floats times `scale`, `digit` bytes apart, with zeros up to `padded`, a multiple of a tile's columns.
  void (*split)(const float* x, int64_t count, int64_t padded, float scale, int8_t* digits, int64_t digit);
  // Four channels, of which some may be null, as quads: digits[to + i] is of channels[…][from + i], or zeros where from < 0.
  void (*split_quads)(const float* const* channels, const Segment* segments, int64_t count, float scale, uint32_t* digits, int64_t digit);
  // By the digits that weights have.
  void (*multiply_left[2])(const AmxJob& job);   // weights on the left
  void (*multiply_right[2])(const AmxJob& job);  // weights on the right
};

// Null where the compiler does not know the unit.
const Amx* amx_loops();

}  // namespace nmconvert
