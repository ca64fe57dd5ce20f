// The kernels without onnxruntime: products and convolutions of every instruction set that this program was compiled for, against
// the plain loops in double precision. Prints the largest error of each, relative to the largest output; exit status 1 above 1e-5.
//
// Compiled with the native sources that do not speak to onnxruntime; see tests/test_runtime_native.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "conv.h"
#include "ort_abi.h"
#include "wide.h"

using namespace nmconvert;

namespace {

std::mt19937 engine(0);

std::vector<float> randoms(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

std::vector<double> widened(const std::vector<float>& values) { return {values.begin(), values.end()}; }

// A weight with n of every m kept, whose mask has a byte for eight entries; `scaled`: its values are bytes, with a scale for each row.
struct Weight {
  std::vector<float> values, scale;
  std::vector<int8_t> bytes;
  std::vector<uint8_t> mask, table;
  Packed packed;

  Weight(const std::vector<int64_t>& shape, int64_t n, int64_t m, bool scaled = false) : table(256 * 8) {
    int64_t size = 1;
    for (int64_t dimension : shape) size *= dimension;
    mask.resize((size + 7) / 8);
    for (int64_t group = 0; group < size; group += m) {
      std::vector<int64_t> places;
      for (int64_t i = group; i < std::min(size, group + m); ++i) places.push_back(i);
      std::shuffle(places.begin(), places.end(), engine);
      for (size_t i = 0; i < std::min<size_t>(n, places.size()); ++i) mask[places[i] / 8] |= static_cast<uint8_t>(1 << places[i] % 8);
    }
    int64_t kept = 0;
    for (uint8_t code : mask) kept += __builtin_popcount(code);
    for (int code = 0; code < 256; ++code)
      for (int bit = 0; bit < 8; ++bit) table[code * 8 + bit] = static_cast<uint8_t>(code >> bit & 1);
    values = randoms(kept);
    packed.values = {values.data(), ort::kFloat, {kept}};
    if (scaled) {
      for (float value : values) bytes.push_back(static_cast<int8_t>(std::clamp(40 * value, -127.0f, 127.0f)));
      for (int64_t row = 0; row < shape[0]; ++row) scale.push_back(0.01f * static_cast<float>(1 + row % 7));
      packed.values = {bytes.data(), ort::kInt8, {kept}};
      packed.scale = {scale.data(), ort::kFloat, {shape[0]}};
    }
    packed.mask = {mask.data(), ort::kUint8, {static_cast<int64_t>(mask.size())}};
    packed.table = {table.data(), ort::kUint8, {256, 8}};
    packed.shape = packed.permuted = shape;
    for (size_t d = 0; d < shape.size(); ++d) packed.perm.push_back(static_cast<int64_t>(d));
    packed.code_shape = {-1, 1, 8};
  }
};

Parallel serial() {
  return Parallel(
      [](void*, Parallel::Body body, size_t count, void* data) {
        for (size_t i = 0; i < count; ++i) body(data, i);
      },
      nullptr, 1);
}

double error(const std::vector<float>& got, const std::vector<double>& expected) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double apart = std::abs(got[i] - expected[i]);
    worst = apart <= worst ? worst : apart;  // a NaN is the worst
    largest = std::max(largest, std::abs(expected[i]));
  }
  return worst / largest;
}

double check_linear(const Isa* isa, int64_t tokens, int64_t columns, int64_t rows, int64_t n, int64_t m, Activation activation, bool scaled) {
  const Weight weight({rows, columns}, n, m, scaled);
  const std::vector<bool> is_row{true, false};
  const Epilogue epilogue{activation, -1e30f, 1e30f};
  const std::vector<float> x = randoms(tokens * columns), bias = randoms(rows), residual = randoms(tokens * rows);
  const std::vector<double> wide_x = widened(x), wide_bias = widened(bias), wide_residual = widened(residual);
  std::vector<float> y(tokens * rows);
  std::vector<double> wide_y(tokens * rows);
  Weights weights(isa, weight.packed, is_row, 1, {n, m}, 1.0f);
  run_linear(isa, weights, weight.packed, 0, {x.data(), tokens, bias.data(), residual.data(), y.data()}, epilogue, serial());
  run_wide_linear(make_wide(weight.packed, is_row, 1, 1.0), 0,
                  {wide_x.data(), tokens, wide_bias.data(), wide_residual.data(), wide_y.data()}, epilogue, serial());
  return error(y, wide_y);
}

double check_conv(const Isa* isa, int64_t kernel, int64_t stride, int64_t side, int64_t channels, int64_t n, int64_t m) {
  const int64_t outputs = 24, batch = 2;
  const Weight weight({outputs, channels, kernel, kernel}, n, m);
  ConvAttributes attributes;
  attributes.kernel = {1, kernel, kernel};
  attributes.strides = {1, stride, stride};
  attributes.before = attributes.after = {0, kernel / 2, kernel / 2};
  attributes.outputs = outputs;
  attributes.inputs = channels;
  const Triple in{1, side, side}, out = conv_output(attributes, in);
  const int64_t size = batch * outputs * out[1] * out[2];
  const std::vector<bool> is_row{true, false, false, false};
  const Epilogue epilogue{Activation::kClip, 0.0f, 1e30f};
  const std::vector<float> x = randoms(batch * channels * side * side), bias = randoms(outputs), residual = randoms(size);
  const std::vector<double> wide_x = widened(x), wide_bias = widened(bias), wide_residual = widened(residual);
  std::vector<float> y(size);
  std::vector<double> wide_y(size);
  Weights weights(isa, weight.packed, is_row, 1, {n, m}, 1.0f);
  run_conv(isa, weights, weight.packed, attributes, {x.data(), bias.data(), residual.data(), y.data(), batch, in, out}, epilogue, serial());
  run_wide_conv(make_wide(weight.packed, is_row, 1, 1.0), attributes,
                {wide_x.data(), wide_bias.data(), wide_residual.data(), wide_y.data(), batch, in, out}, epilogue, serial());
  return error(y, wide_y);
}

double check(const Isa* isa) {
  constexpr int64_t patterns[][2] = {{2, 4}, {1, 4}, {4, 8}, {1, 16}, {3, 7}};
  double worst = 0;
  for (const auto& [n, m] : patterns) {
    for (int64_t tokens : {1, 2, 3, 5, 8, 13, 33, 130})
      for (Activation activation : {Activation::kNone, Activation::kSilu, Activation::kGelu, Activation::kGeluTanh})
        for (bool scaled : {false, true}) worst = std::max(worst, check_linear(isa, tokens, 200, 37, n, m, activation, scaled));
    for (int64_t kernel : {1, 3, 5})
      for (int64_t stride : {1, 2})
        for (int64_t side : {7, 15, 32}) worst = std::max(worst, check_conv(isa, kernel, stride, side, 32, n, m));
  }
  return worst;
}

}  // namespace

int main() {
  bool good = true;
  for (const Isa* isa : {isa_portable(), isa_avx2(), isa_avx512(), isa_neon()}) {
    if (!isa) continue;
    setenv("NMCONVERT_ISA", isa->name, 1);
    if (select_isa() != isa) continue;  // this CPU does not have it
    const double worst = check(isa);
    good = good && worst < 1e-5;
    std::printf("%s %.2e\n", isa->name, worst);
  }
  return good ? 0 : 1;
}
