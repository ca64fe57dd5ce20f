#include "conv.h"

#include <algorithm>

namespace nmconvert {
namespace {

constexpr double kFill = 1.6;  // cycles to gather one vector of a panel

int64_t volume(const Triple& t) { return t[0] * t[1] * t[2]; }

// Where pixels stand: the input itself, or a copy with zeros around it, whose columns are sorted by their remainder modulo the
// stride, so that whatever a kernel position reads from one output row is contiguous.
struct Source {
  const float* data;
  int64_t image, channel, slice, row;  // strides
  int64_t phase;                       // floats between remainders
  bool padded;
};

// A 1×1 convolution without stride or pads takes an image for one long row. Says whether this is one.
bool flatten_pointwise(const ConvAttributes& attributes, Image& image) {
  if (volume(attributes.kernel) != 1 || volume(attributes.strides) != 1) return false;
  for (int d = 0; d < 3; ++d)
    if (attributes.before[d] || attributes.after[d]) return false;
  image.in = image.out = {1, 1, volume(image.in)};
  return true;
}

Source make_source(const ConvAttributes& attributes, const Image& image, const Parallel& parallel) {
  const int64_t stride = attributes.strides[2], channels = attributes.groups * attributes.inputs;
  const Triple& in = image.in;
  bool pads = stride > 1;
  for (int d = 0; d < 3; ++d) pads = pads || attributes.before[d] || attributes.after[d];
  if (!pads) return {image.x, channels * volume(in), volume(in), in[1] * in[2], in[2], 0, false};

  Triple extent;
  for (int d = 0; d < 3; ++d) extent[d] = in[d] + attributes.before[d] + attributes.after[d];
  const int64_t phase = ceil_div(extent[2], stride), row = phase * stride, slice = row * extent[1], channel = slice * extent[0];
  if (static_cast<double>(channel) * static_cast<double>(channels * image.batch) > 1e11) throw std::bad_alloc();
  float* copy = Scratch::mine().shared_input.at_least(channel * channels * image.batch);
  parallel(channels * image.batch, [&](int64_t plane) {
    float* to = copy + plane * channel;
    const float* from = image.x + plane * volume(in);
    std::fill_n(to, channel, 0.0f);
    for (int64_t z = 0; z < in[0]; ++z)
      for (int64_t y = 0; y < in[1]; ++y, from += in[2]) {
        float* line = to + (z + attributes.before[0]) * slice + (y + attributes.before[1]) * row;
        if (stride == 1) {
          std::copy_n(from, in[2], line + attributes.before[2]);
          continue;
        }
        int64_t at = attributes.before[2] / stride, remainder = attributes.before[2] % stride;
        for (int64_t x = 0; x < in[2]; ++x) {
          line[remainder * phase + at] = from[x];
          if (++remainder == stride) remainder = 0, ++at;
        }
      }
  });
  return {copy, channel * channels, channel, slice, row, phase, true};
}

// For every column of the weight, in the file's order, where it reads relative to the pixel.
const int64_t* column_offsets(const ConvAttributes& a, const Source& source, const std::vector<uint32_t>& order) {
  int64_t* offsets = Scratch::mine().shared_offsets.at_least(static_cast<int64_t>(order.size()));
  for (size_t i = 0; i < order.size(); ++i) {
    int64_t rest = order[i];
    const int64_t x = rest % a.kernel[2] * a.dilations[2];
    rest /= a.kernel[2];
    const int64_t y = rest % a.kernel[1] * a.dilations[1];
    rest /= a.kernel[1];
    const int64_t z = rest % a.kernel[0] * a.dilations[0];
    const int64_t channel = rest / a.kernel[0];
    offsets[i] = channel * source.channel + z * source.slice + y * source.row + x % a.strides[2] * source.phase + x / a.strides[2];
  }
  return offsets;
}

// The runs of the output pixels [first, first + count) of the whole batch.
int64_t find_segments(const ConvAttributes& a, const Image& image, const Source& source, int64_t first, int64_t count, Segment* segments) {
  const Triple& out = image.out;
  int64_t found = 0;
  for (int64_t done = 0; done < count;) {
    int64_t rest = first + done;
    const int64_t x = rest % out[2];
    rest /= out[2];
    const int64_t y = rest % out[1];
    rest /= out[1];
    const int64_t z = rest % out[0], n = rest / out[0];
    const int64_t length = std::min(count - done, out[2] - x);
    segments[found++] = {n * source.image + z * a.strides[0] * source.slice + y * a.strides[1] * source.row + x, done, length};
    done += length;
  }
  return found;
}

void fill_panel(const Isa* isa, const Source& source, const float* base, const int64_t* offsets, int64_t columns, const Segment* segments,
                int64_t count, float* panel, int64_t width) {
  if (source.padded) return isa->gather(base, offsets, columns, segments, count, panel, width);  // the copy has room beyond runs
  for (int64_t column = 0; column < columns; ++column, panel += width)
    for (int64_t s = 0; s < count; ++s) std::memcpy(panel + segments[s].to, base + offsets[column] + segments[s].from, segments[s].count * 4);
}

// One panel of pixels and a range of output channels.
struct Task {
  int64_t group, first, count, row, rows;
};

struct Run {
  const Isa* isa;
  TileChoice choice;
  const StreamPlan& plan;
  const ConvAttributes& attributes;
  const Image& image;
  const Source& source;
  const int64_t* offsets;
  const Epilogue& epilogue;

  void operator()(const Task& task) const;
  void scatter(const Task& task, const float* sums, int64_t width) const;
};

void Run::operator()(const Task& task) const {
  const int64_t width = choice.panel_width(), size = volume(image.out);
  Scratch& scratch = Scratch::mine();
  float* panel = scratch.own_panel.at_least((plan.chunk + 1) * width);
  float* sums = scratch.own_sums.at_least(task.rows * width);
  Segment* segments = scratch.own_segments.at_least(width);
  const int64_t found = find_segments(attributes, image, source, task.first, task.count, segments);
  const float* base = source.data + task.group * attributes.inputs * source.channel;
  const int64_t channel = task.group * plan.rows + task.row, n = task.first / size, pixel = task.first % size;
  const int64_t at = (n * attributes.outputs + channel) * size + pixel;
  const bool direct = task.count == width && pixel + width <= size;

  StreamJob job{};
  job.values = plan.values.data();
  job.offsets = plan.offsets.data();
  job.rows = task.rows;
  job.panel = panel;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t column = chunk * plan.chunk, columns = std::min(plan.chunk, plan.columns - column);
    fill_panel(isa, source, base, offsets + column, columns, segments, found, panel, width);
    const bool first = chunk == 0, last = chunk + 1 == plan.chunks;
    job.starts = plan.start(task.group, chunk, task.row / choice.shape().rows);
    job.bias = first && image.bias ? image.bias + channel : nullptr;
    job.in = first ? nullptr : sums;
    job.in_stride = width;
    if (first && direct && image.residual) job.in = image.residual + at, job.in_stride = size;
    job.out = last && direct ? image.y + at : sums;
    job.out_stride = last && direct ? size : width;
    const bool clips = last && (direct || !image.residual);
    job.low = clips ? epilogue.low : -__builtin_inff();
    job.high = clips ? epilogue.high : __builtin_inff();
    choice.shape().stream(job);
  }
  if (!direct) return scatter(task, sums, width);
  for (int64_t r = 0; r < task.rows; ++r) isa->activate(image.y + at + r * size, width, epilogue.activation);
}

// A panel that is not full, or lies in several images.
void Run::scatter(const Task& task, const float* sums, int64_t width) const {
  const int64_t size = volume(image.out), channel = task.group * plan.rows + task.row;
  for (int64_t done = 0; done < task.count;) {
    const int64_t n = (task.first + done) / size, pixel = (task.first + done) % size;
    const int64_t count = std::min(task.count - done, size - pixel);
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t at = (n * attributes.outputs + channel + r) * size + pixel;
      const float* from = sums + r * width + done;
      if (image.residual) {
        for (int64_t i = 0; i < count; ++i) {
          float y = from[i] + image.residual[at + i];
          y = y < epilogue.low ? epilogue.low : y;
          image.y[at + i] = y > epilogue.high ? epilogue.high : y;
        }
      } else {
        std::memcpy(image.y + at, from, count * 4);
      }
      isa->activate(image.y + at, count, epilogue.activation);
    }
    done += count;
  }
}

}  // namespace

Triple conv_output(ConvAttributes& a, const Triple& in) {
  Triple out;
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = (a.kernel[d] - 1) * a.dilations[d] + 1;
    if (a.auto_pad == "SAME_UPPER" || a.auto_pad == "SAME_LOWER") {
      const int64_t pads = std::max<int64_t>(0, (ceil_div(in[d], a.strides[d]) - 1) * a.strides[d] + reach - in[d]);
      a.before[d] = a.auto_pad == "SAME_UPPER" ? pads / 2 : pads - pads / 2;
      a.after[d] = pads - a.before[d];
    }
    const int64_t extent = in[d] + a.before[d] + a.after[d];
    if (extent < reach)
      throw InvalidNode("the input of " + std::to_string(extent) + " with its pads is smaller than the kernel of " + std::to_string(reach));
    out[d] = (extent - reach) / a.strides[d] + 1;
  }
  return out;
}

void run_conv(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& given, const Image& given_image,
              const Epilogue& epilogue, const Parallel& parallel) {
  ConvAttributes attributes = given;
  Image image = given_image;
  const bool pointwise = flatten_pointwise(attributes, image);
  const int64_t pixels = image.batch * volume(image.out);
  if (pixels == 0) return;
  if (pointwise && attributes.groups == 1 && volume(image.in) == 1)
    return run_linear(isa, weights, packed, 0, {image.x, image.batch, image.bias, image.residual, image.y}, epilogue, parallel);
  const TileChoice choice = choose_tile(isa, weights, pixels, kFill);
  const StreamPlan& plan = weights.stream(packed, *choice.isa, choice.tile);
  const Source source = make_source(attributes, image, parallel);
  const int64_t* offsets = column_offsets(attributes, source, weights.order());
  const Run run{choice.isa, choice, plan, attributes, image, source, offsets, epilogue};

  // Splitting the rows gathers every panel once more: worth it only where there are few panels and many rows.
  const int64_t width = choice.panel_width(), panels = ceil_div(pixels, width);
  const int64_t wanted = ceil_div(wanted_tasks() / 2, panels * attributes.groups);
  const int64_t useful = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(plan.rows) * weights.density() / 32));
  const int64_t per_task = ceil_div(ceil_div(plan.rows, std::min(wanted, useful)), choice.row_unit()) * choice.row_unit();
  const int64_t splits = ceil_div(plan.rows, per_task);
  parallel(attributes.groups * panels * splits, [&](int64_t index) {
    const int64_t row = index % splits * per_task, panel = index / splits % panels, first = panel * width;
    run({index / splits / panels, first, std::min(width, pixels - first), row, std::min(per_task, plan.rows - row)});
  });
}

void prepare_conv(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& given, int64_t batch, const Triple& in) {
  ConvAttributes attributes = given;
  Image image{nullptr, nullptr, nullptr, nullptr, batch, in, conv_output(attributes, in)};
  double likely = static_cast<double>(batch);
  for (int64_t size : image.out) likely *= static_cast<double>(size);
  if (likely == 0 || likely > 1e10) return;  // what cannot run is not prepared for
  const int64_t pixels = batch * volume(image.out);
  if (flatten_pointwise(attributes, image) && attributes.groups == 1 && volume(image.in) == 1)
    return prepare_linear(isa, weights, packed, batch);
  const TileChoice choice = choose_tile(isa, weights, pixels, kFill);
  weights.stream(packed, *choice.isa, choice.tile);
}

}  // namespace nmconvert
