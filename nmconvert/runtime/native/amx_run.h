// Linear layers and convolutions on the matrix unit: what run_linear and run_conv do where it is the fastest.
#pragma once

#include <algorithm>

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
// False where the inputs are not such that the unit should take them (amx.h): then nothing was done.
bool run_amx_conv(const Isa* isa, const AmxPlan& plan, const ConvAttributes& attributes, const Image& image, const Epilogue& epilogue,
                  const Parallel& parallel);

// Whether a job goes to the matrix unit, of its estimated cycles and those of the vectors.
bool takes_amx(const Isa* isa, const Weights& weights, double cycles, double otherwise);
// Estimated cycles of sixteen rows of weights against so many input tiles.
double amx_tile_cycles(int digits, int64_t steps, int64_t inputs);
// Room that a job (amx.h) unpacks weights in.
inline int64_t unpacked_bytes(const AmxPlan& plan) { return std::max<int64_t>(4, plan.order.steps() + 1) * plan.digits * kTileSize; }
// Bytes of inputs, as digits, that stay in the L2 cache while all weights pass by.
int64_t amx_panel_bytes();

}  // namespace nmconvert
