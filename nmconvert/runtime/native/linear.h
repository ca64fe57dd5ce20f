// X · W + bias, for one group of rows of the weights and any number of tokens.
#pragma once

#include "weights.h"

namespace nmconvert {

struct Epilogue {
  Activation activation = Activation::kNone;
  float low, high;  // ±infinity where nothing is clipped
};

template <typename Real>
struct TokensOf {
  const Real* x;  // [tokens][columns]
  int64_t tokens;
  const Real* bias;      // [rows], or null
  const Real* residual;  // [tokens][rows], or null
  Real* y;               // [tokens][rows]
};
using Tokens = TokensOf<float>;

void run_linear(const Isa* isa, Weights& weights, const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
                const Parallel& parallel);

// The same by the row loops, whatever the number of tokens.
void run_rows(const Isa* isa, Weights& weights, const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
              const Parallel& parallel);

// Prepacks what run_linear reads for this many tokens.
void prepare_linear(const Isa* isa, Weights& weights, const Packed& packed, int64_t tokens);

}  // namespace nmconvert
