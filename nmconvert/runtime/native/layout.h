// Where a panel of activations holds what a column of the weight reads.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace nmconvert {

struct Hint {
  int64_t n = 1, m = 1;  // the pattern: chunks that hold whole groups of it need the least padding
};

// What a two-dimensional kernel reads of one input channel, where panels are strips.
struct Kernel {
  int64_t rows = 1, columns = 1, dilation = 1, stride = 1;  // dilation and stride: from row to row

  // Kernel rows start at multiples of this, modulo the stride.
  int64_t remainder_step() const { return std::gcd(dilation, stride); }
  int64_t remainders() const { return stride / remainder_step(); }
};

// A panel consists of lines of `height` vectors, and of those stand in the L1 cache a chunk at a time. A kept entry multiplies
// as many vectors as the tile has, from some place in a line on.
//
// Columns: a line for every column of the weight, in the file's order (im2col, or tokens).
// Strips: the vectors of a line are output rows, one below the other, so that kernel rows read the same line, a vector further
// down. A channel has a line for every kernel column and remainder of the kernel rows modulo the stride: for 3×3 without
// stride three lines of n + 2 vectors hold what nine of n would.
//
// In place: the channels of an image, whose lines lie `pitch` vectors apart, and which are read where they are.
struct Layout {
  bool strips = false;
  int64_t columns = 0;        // of the weight
  int64_t channels = 0;       // what chunks are multiples of: input channels, or single columns
  int64_t channel_lines = 1;  // lines of a channel
  int64_t height = 0;
  int64_t pitch = 0;          // vectors from the start of a line to that of the next
  int64_t width = 0;          // floats of a vector
  int64_t chunk = 0;          // channels of a chunk
  Kernel kernel;

  int64_t lines() const { return channels * channel_lines; }
  int64_t chunk_lines() const { return chunk * channel_lines; }
  int64_t chunks() const { return (channels + chunk - 1) / chunk; }
  bool in_place() const { return pitch != height; }
  // Floats of a chunk of a panel that is packed.
  int64_t chunk_size() const { return chunk_lines() * height * width; }

  // Whether offsets of 16 bits reach all of a chunk, and where it is read in place, its lines do not displace each other in the L1
  // cache, nor its pages in the first TLB.
  bool fits() const;

  struct Place {
    uint32_t chunk;
    uint16_t offset;  // vectors from the start of the chunk
    uint16_t number;  // among the columns of the chunk, in the file's order
  };
  // Of every column in the file's order; `order` gives their places in the operator's own: channel, row, column.
  std::vector<Place> places(const std::vector<uint32_t>& order) const;
};

Layout column_layout(int64_t columns, double density, Hint hint, int64_t vectors, int64_t width);
Layout in_place_layout(int64_t columns, double density, Hint hint, int64_t vectors, int64_t width, int64_t pitch);
Layout strip_layout(int64_t channels, const Kernel& kernel, double density, Hint hint, int64_t vectors, int64_t width);

}  // namespace nmconvert
