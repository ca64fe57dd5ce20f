// The pixels that a convolution reads, so arranged that whatever one kernel position reads for a row of outputs is contiguous.
#pragma once

#include "conv.h"

namespace nmconvert {

inline int64_t volume(const Triple& t) { return t[0] * t[1] * t[2]; }

// The input itself, or a copy with zeros around it, whose columns are sorted by their remainder modulo the stride.
struct Source {
  const float* data;
  int64_t size;                        // floats that may be read
  int64_t image, channel, slice, row;  // strides
  int64_t phase;                       // floats between remainders
  int64_t stride = 1;                  // from the pixel of an output to that of the next
  bool padded = true;                  // the pads can be read; where not, `data` is still where they would begin

  // Where column `x` of the kernel, in pixels, reads relative to the first.
  int64_t column(int64_t x, int64_t stride) const { return padded ? x % stride * phase + x / stride : x; }
};

// A copy is made where there are pads or strides, and where `slack` floats have to be readable beyond the end.
Source make_source(const Isa* isa, const ConvAttributes& attributes, const Image& image, int64_t slack, const Parallel& parallel);

// The images as they are, whose pads may not be read.
Source unpadded_source(const ConvAttributes& attributes, const Image& image);

// A 1×1 convolution without pads takes an image for one long row. Says whether this is one; pixels between strides are left out
// by subsample().
bool flatten_pointwise(ConvAttributes& attributes, Image& image);
// The pixels of `given` that a flattened convolution with strides reads.
const float* subsample(const Isa* isa, const ConvAttributes& given, const Image& image, const Parallel& parallel);

}  // namespace nmconvert
