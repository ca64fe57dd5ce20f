#include "wide.h"

#include <cmath>

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

double finish(double y, const Epilogue& epilogue) {
  y = y < epilogue.low ? epilogue.low : y;
  y = y > epilogue.high ? epilogue.high : y;
  switch (epilogue.activation) {
    case Activation::kSilu: return y / (1 + std::exp(-y));
    case Activation::kGelu: return 0.5 * y * (1 + std::erf(y * std::sqrt(0.5)));
    case Activation::kGeluTanh: return 0.5 * y * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (y + 0.044715 * y * y * y)));
    default: return y;
  }
}

}  // namespace

WideWeights make_wide(const Packed& packed, const std::vector<bool>& is_row, int64_t groups, double scale) {
  WideWeights weights{decode(packed, is_row), {}, groups};
  if (weights.matrix.rows % groups) throw InvalidNode("the output channels do not divide into the groups");
  weights.values.resize(weights.matrix.kept());
  std::vector<float> widened;
  const double* doubles = packed.values.type == ort::kDouble ? static_cast<const double*>(packed.values.data) : nullptr;
  const float* floats = doubles ? nullptr : widen(packed.values, widened);
  const float* scales = static_cast<const float*>(packed.scale.data);
  for (int64_t row = 0; row < weights.matrix.rows; ++row) {
    const double factor = scales ? scale * static_cast<double>(scales[row]) : scale;
    weights.matrix.each_entry(row, [&](uint32_t entry, uint32_t) {
      const uint32_t from = weights.matrix.value_index(entry);
      weights.values[entry] = factor * (doubles ? doubles[from] : static_cast<double>(floats[from]));
    });
  }
  return weights;
}

void run_wide_linear(const WideWeights& weights, int64_t group, const TokensOf<double>& tokens, const Epilogue& epilogue,
                     const Parallel& parallel) {
  const SparseRows& matrix = weights.matrix;
  const int64_t rows = matrix.rows / weights.groups;
  if (tokens.tokens == 0) return;
  parallel(rows, [&](int64_t row) {
    const int64_t stored = group * rows + row;
    for (int64_t t = 0; t < tokens.tokens; ++t) {
      double sum = (tokens.bias ? tokens.bias[row] : 0.0) + (tokens.residual ? tokens.residual[t * rows + row] : 0.0);
      matrix.each_entry(stored, [&](uint32_t entry, uint32_t column) {
        sum += weights.values[entry] * tokens.x[t * matrix.columns + matrix.order[column]];
      });
      tokens.y[t * rows + row] = finish(sum, epilogue);
    }
  });
}

void run_wide_conv(const WideWeights& weights, const ConvAttributes& a, const ImageOf<double>& image, const Epilogue& epilogue,
                   const Parallel& parallel) {
  const SparseRows& matrix = weights.matrix;
  const Triple &in = image.in, &out = image.out;
  const int64_t in_size = in[0] * in[1] * in[2], out_size = out[0] * out[1] * out[2];
  if (image.batch * out_size == 0) return;
  parallel(image.batch * matrix.rows, [&](int64_t task) {
    const int64_t row = task % matrix.rows, n = task / matrix.rows, group = row / (matrix.rows / weights.groups);
    const double* x = image.x + (n * a.groups + group) * a.inputs * in_size;
    for (int64_t pixel = 0; pixel < out_size; ++pixel) {
      const Triple at{pixel / out[2] / out[1], pixel / out[2] % out[1], pixel % out[2]};
      const int64_t to = task * out_size + pixel;
      double sum = (image.bias ? image.bias[row] : 0.0) + (image.residual ? image.residual[to] : 0.0);
      matrix.each_entry(row, [&](uint32_t entry, uint32_t column) {
        int64_t rest = matrix.order[column], from = 0, step = 1;
        bool inside = true;
        for (int d = 3; d-- > 0; rest /= a.kernel[d], step *= in[d]) {
          const int64_t place = at[d] * a.strides[d] + rest % a.kernel[d] * a.dilations[d] - a.before[d];
          inside = inside && place >= 0 && place < in[d];
          from += place * step;
        }
        if (inside) sum += weights.values[entry] * x[rest * in_size + from];
      });
      image.y[to] = finish(sum, epilogue);
    }
  });
}

}  // namespace nmconvert
