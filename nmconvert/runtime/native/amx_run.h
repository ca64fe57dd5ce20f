// Linear layers and convolutions on the matrix unit: what run_linear and run_conv do where it is the fastest.
#pragma once

#include "conv.h"

namespace nmconvert {

// How a linear layer takes its weights, and the estimated cycles for `tokens`.
AmxOrder amx_order(const Weights& weights);
double amx_cycles(const Weights& weights, int64_t tokens);
void run_amx_linear(const Isa* isa, const AmxPlan& plan, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
                    const Parallel& parallel);

// The same for a convolution, which has to be of one or two dimensions.
bool fits_amx(const ConvAttributes& attributes, const Image& image);
AmxOrder amx_order(const ConvAttributes& attributes);
double amx_cycles(const Weights& weights, const ConvAttributes& attributes, const Image& image);
void run_amx_conv(const Isa* isa, const AmxPlan& plan, const ConvAttributes& attributes, const Image& image, const Epilogue& epilogue,
                  const Parallel& parallel);

// Whether a job goes to the matrix unit, of its estimated cycles and those of the vectors.
bool takes_amx(const Isa* isa, const Weights& weights, double cycles, double otherwise);
// Estimated cycles of a weight tile against so many input tiles, which take `load` more each to be brought in.
double amx_tile_cycles(int64_t inputs, double load);
// Bytes of inputs, as parts, that stay in the L2 cache while all weights pass by.
int64_t amx_panel_bytes();

}  // namespace nmconvert
