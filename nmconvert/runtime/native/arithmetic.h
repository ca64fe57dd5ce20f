// Arithmetic of a node: floats on the kernels, doubles on plain loops.
#pragma once

#include "conv.h"
#include "wide.h"

namespace nmconvert {

class FloatMath {
 public:
  using Real = float;
  FloatMath(const Isa* isa, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale)
      : isa_(isa), weights_(isa, packed, is_row, groups, hint, scale) {}

  // Prepacks for inputs of a size that is known, or likely, when the session is made.
  void prepare_linear(const Packed& packed, int64_t tokens) { nmconvert::prepare_linear(isa_, weights_, packed, tokens); }
  void prepare_conv(const Packed& packed, const ConvAttributes& attributes, int64_t batch, const Triple& in) {
    nmconvert::prepare_conv(isa_, weights_, packed, attributes, batch, in);
  }
  void ready() { weights_.ready(); }

  void linear(const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue, const Parallel& parallel) {
    run_linear(isa_, weights_, packed, group, tokens, epilogue, parallel);
  }
  void conv(const Packed& packed, const ConvAttributes& attributes, const Image& image, const Epilogue& epilogue, const Parallel& parallel) {
    run_conv(isa_, weights_, packed, attributes, image, epilogue, parallel);
  }

 private:
  const Isa* isa_;
  Weights weights_;
};

class DoubleMath {
 public:
  using Real = double;
  DoubleMath(const Isa*, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint, float scale)
      : weights_(make_wide(packed, is_row, groups, scale)) {}

  void prepare_linear(const Packed&, int64_t) {}
  void prepare_conv(const Packed&, const ConvAttributes&, int64_t, const Triple&) {}
  void ready() {}

  void linear(const Packed&, int64_t group, const TokensOf<double>& tokens, const Epilogue& epilogue, const Parallel& parallel) {
    run_wide_linear(weights_, group, tokens, epilogue, parallel);
  }
  void conv(const Packed&, const ConvAttributes& attributes, const ImageOf<double>& image, const Epilogue& epilogue,
            const Parallel& parallel) {
    run_wide_conv(weights_, attributes, image, epilogue, parallel);
  }

 private:
  WideWeights weights_;
};

}  // namespace nmconvert
