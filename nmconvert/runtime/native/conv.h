// Convolutions of one, two and three dimensions, as products with panels of gathered pixels.
#pragma once

#include <array>
#include <string>

#include "linear.h"

namespace nmconvert {

using Triple = std::array<int64_t, 3>;  // depth, height, width; leading ones where there are fewer dimensions

struct ConvAttributes {
  Triple kernel{1, 1, 1}, strides{1, 1, 1}, dilations{1, 1, 1}, before{0, 0, 0}, after{0, 0, 0};
  int64_t groups = 1, outputs = 0, inputs = 0;  // inputs: of one group
  std::string auto_pad = "NOTSET";
};

template <typename Real>
struct ImageOf {
  const Real* x;         // [batch][groups · inputs][in]
  const Real* bias;      // [outputs], or null
  const Real* residual;  // [batch][outputs][out], or null
  Real* y;               // [batch][outputs][out]
  int64_t batch;
  Triple in, out;
  int64_t of = 1;  // the batch that these images are part of: all of it lies in the caches, or does not
};
using Image = ImageOf<float>;

// Whether the output lies beyond the L2 cache.
inline bool is_afar(const ConvAttributes& attributes, const Image& image) {
  constexpr int64_t kFloatsInCache = 1 << 18;
  return image.of * attributes.outputs * image.out[0] * image.out[1] * image.out[2] > kFloatsInCache;
}

// The output's extent, and with auto_pad the pads that lead to it. Throws InvalidNode where the kernel does not fit.
Triple conv_output(ConvAttributes& attributes, const Triple& in);

void run_conv(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& attributes, const Image& image,
              const Epilogue& epilogue, const Parallel& parallel);

// Prepacks what run_conv reads for images of this batch and extent.
void prepare_conv(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& attributes, int64_t batch, const Triple& in);

}  // namespace nmconvert
