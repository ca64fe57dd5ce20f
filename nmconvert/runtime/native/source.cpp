#include "source.h"

#include <algorithm>
#include <cstdio>
#include <string>

namespace nmconvert {
namespace {

constexpr int64_t kCopiedByTask = 1 << 16;    // floats
constexpr double kAlwaysCopied = 1 << 24;     // floats
constexpr double kMostCopies = 16;            // of what a convolution reads and computes

bool has_pads(const ConvAttributes& attributes) {
  for (int d = 0; d < 3; ++d)
    if (attributes.before[d] || attributes.after[d]) return true;
  return false;
}

// A channel behind its pads, without a stride from column to column.
void pad_channel(const Isa* isa, const ConvAttributes& a, const Triple& in, const float* from, int64_t row, int64_t slice, float* to) {
  std::fill_n(to, a.before[0] * slice, 0.0f);
  to += a.before[0] * slice;
  for (int64_t z = 0; z < in[0]; ++z, from += in[1] * in[2], to += slice) {
    float* first = to + a.before[1] * row;
    std::fill_n(to, a.before[1] * row, 0.0f);
    isa->pad(from, in[1], in[2], a.before[2], row, first);
    std::fill_n(first + in[1] * row, a.after[1] * row, 0.0f);
  }
  std::fill_n(to, a.after[0] * slice, 0.0f);
}

// The same with a stride: of each row those pixels together that have the same remainder.
void sort_channel(const Isa* isa, const ConvAttributes& a, const Triple& in, const float* from, int64_t phase, int64_t row, int64_t slice,
                  float* to) {
  const int64_t stride = a.strides[2];
  std::fill_n(to, slice * (in[0] + a.before[0] + a.after[0]), 0.0f);
  for (int64_t z = 0; z < in[0]; ++z)
    for (int64_t y = 0; y < in[1]; ++y, from += in[2]) {
      float* first = to + (z + a.before[0]) * slice + (y + a.before[1]) * row;
      for (int64_t x = 0; x < std::min(stride, in[2]); ++x) {
        const int64_t at = x + a.before[2];
        isa->every(from + x, stride, (in[2] - x + stride - 1) / stride, first + at % stride * phase + at / stride);
      }
    }
}

std::string whole(double number) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.0f", number);
  return digits;
}

// Pads and strides of a few bytes could ask for any memory: a copy may be as large as what is read and computed makes likely.
void check_copy(const ConvAttributes& a, const Image& image, double channel) {
  const double planes = static_cast<double>(a.groups * a.inputs * image.batch), copied = channel * planes;
  const double read = static_cast<double>(volume(image.in)) * planes;
  const double computed = static_cast<double>(volume(image.out)) * static_cast<double>(volume(a.kernel)) * planes;
  if (copied > kAlwaysCopied + kMostCopies * (read + computed))
    throw InvalidNode("the input with its pads would have " + whole(copied) + " numbers, without them " + whole(read));
}

}  // namespace

Source make_source(const Isa* isa, const ConvAttributes& attributes, const Image& image, int64_t slack, const Parallel& parallel) {
  const int64_t stride = attributes.strides[2], channels = attributes.groups * attributes.inputs;
  const Triple& in = image.in;
  if (!has_pads(attributes) && stride == 1 && slack == 0) {
    const int64_t channel = volume(in);
    return {image.x, channel * channels * image.batch, channel * channels, channel, in[1] * in[2], in[2], 0};
  }
  Triple extent;
  for (int d = 0; d < 3; ++d) extent[d] = in[d] + attributes.before[d] + attributes.after[d];
  const int64_t phase = ceil_div(extent[2], stride), row = phase * std::min(stride, extent[2]);
  check_copy(attributes, image, static_cast<double>(row) * static_cast<double>(extent[1]) * static_cast<double>(extent[0]));
  const int64_t slice = row * extent[1], channel = slice * extent[0], size = channel * channels * image.batch + slack;
  float* copy = Scratch::mine().shared_input.at_least(size);
  std::fill_n(copy + size - slack, slack, 0.0f);
  const int64_t planes = channels * image.batch, per_task = std::max<int64_t>(1, kCopiedByTask / channel);
  parallel(ceil_div(planes, per_task), [&](int64_t task) {
    for (int64_t plane = task * per_task; plane < std::min(planes, (task + 1) * per_task); ++plane) {
      const float* from = image.x + plane * volume(in);
      float* to = copy + plane * channel;
      stride == 1 ? pad_channel(isa, attributes, in, from, row, slice, to) : sort_channel(isa, attributes, in, from, phase, row, slice, to);
    }
  });
  return {copy, size, channel * channels, channel, slice, row, phase};
}

Source unpadded_source(const ConvAttributes& attributes, const Image& image) {
  const int64_t channel = volume(image.in), slice = image.in[1] * image.in[2], row = image.in[2];
  const int64_t images = attributes.groups * attributes.inputs * channel;
  const float* pads = image.x - attributes.before[0] * slice - attributes.before[1] * row - attributes.before[2];
  return {pads, images * image.batch, images, channel, slice, row, 0, attributes.strides[2], false};
}

bool flatten_pointwise(ConvAttributes& attributes, Image& image) {
  if (volume(attributes.kernel) != 1 || has_pads(attributes)) return false;
  attributes.strides = {1, 1, 1};
  image.in = image.out = {1, 1, volume(image.out)};
  return true;
}

const float* subsample(const Isa* isa, const ConvAttributes& given, const Image& image, const Parallel& parallel) {
  if (volume(given.strides) == 1) return image.x;
  const int64_t channels = given.groups * given.inputs, size = volume(image.out);
  // Not the shared input: a linear layer packs these pixels into that.
  float* copy = Scratch::mine().shared_pixels.at_least(size * channels * image.batch);
  parallel(channels * image.batch, [&](int64_t plane) {
    float* to = copy + plane * size;
    const float* slice = image.x + plane * volume(image.in);
    for (int64_t z = 0; z < image.out[0]; ++z)
      for (int64_t y = 0; y < image.out[1]; ++y) {
        const float* row = slice + (z * given.strides[0] * image.in[1] + y * given.strides[1]) * image.in[2];
        isa->every(row, given.strides[2], image.out[2], to);
        to += image.out[2];
      }
  });
  return copy;
}

}  // namespace nmconvert
