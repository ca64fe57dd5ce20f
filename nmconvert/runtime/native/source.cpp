#include "source.h"

#include <algorithm>

namespace nmconvert {
namespace {

constexpr int64_t kCopiedByTask = 1 << 14;  // floats

bool has_pads(const ConvAttributes& attributes) {
  for (int d = 0; d < 3; ++d)
    if (attributes.before[d] || attributes.after[d]) return true;
  return false;
}

// One row of pixels, those of each remainder modulo the stride together, behind `before` zeros.
void copy_row(const Isa* isa, const float* from, int64_t count, int64_t before, int64_t stride, int64_t phase, float* to) {
  for (int64_t first = 0; first < std::min(stride, count); ++first) {
    float* next = to + (first + before) % stride * phase + (first + before) / stride;
    if (stride == 1) {
      std::copy_n(from, count, next);
    } else {
      isa->every(from + first, stride, (count - first + stride - 1) / stride, next);
    }
  }
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
  const int64_t phase = ceil_div(extent[2], stride), row = phase * stride, slice = row * extent[1], channel = slice * extent[0];
  if (static_cast<double>(channel) * static_cast<double>(channels * image.batch) > 1e11) throw std::bad_alloc();
  const int64_t size = channel * channels * image.batch + slack;
  float* copy = Scratch::mine().shared_input.at_least(size);
  std::fill_n(copy + size - slack, slack, 0.0f);
  const int64_t planes = channels * image.batch, per_task = std::max<int64_t>(1, kCopiedByTask / channel);
  parallel(ceil_div(planes, per_task), [&](int64_t task) {
    for (int64_t plane = task * per_task; plane < std::min(planes, (task + 1) * per_task); ++plane) {
      float* to = copy + plane * channel;
      const float* from = image.x + plane * volume(in);
      std::fill_n(to, channel, 0.0f);
      for (int64_t z = 0; z < in[0]; ++z)
        for (int64_t y = 0; y < in[1]; ++y, from += in[2])
          copy_row(isa, from, in[2], attributes.before[2], stride, phase,
                   to + (z + attributes.before[0]) * slice + (y + attributes.before[1]) * row);
    }
  });
  return {copy, size, channel * channels, channel, slice, row, phase};
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
