// Products and convolutions computed in double precision: plain loops, for models that ask for it.
#pragma once

#include "conv.h"

namespace nmconvert {

struct WideWeights {
  SparseRows matrix;
  std::vector<double> values;
  int64_t groups;
};

WideWeights make_wide(const Packed& packed, const std::vector<bool>& is_row, int64_t groups, double scale);

void run_wide_linear(const WideWeights& weights, int64_t group, const TokensOf<double>& tokens, const Epilogue& epilogue,
                     const Parallel& parallel);
void run_wide_conv(const WideWeights& weights, const ConvAttributes& attributes, const ImageOf<double>& image, const Epilogue& epilogue,
                   const Parallel& parallel);

}  // namespace nmconvert
