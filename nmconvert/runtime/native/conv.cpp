#include "conv.h"

#include <algorithm>

#include "amx_run.h"
#include "source.h"

namespace nmconvert {
namespace {

int64_t pixels_of(const Image& image) { return image.batch * volume(image.out); }

// Columns where there is one row or one kernel row: strips would hold no less.
bool takes_strips(const ConvAttributes& attributes, const Image& image) {
  return attributes.kernel[1] > 1 && image.out[1] > 1 && image.in[0] * attributes.kernel[0] * image.out[0] == 1 &&
         attributes.before[0] + attributes.after[0] == 0;
}

// What moving costs, in cycles a vector: columns are gathered by runs of output rows, strips by pieces.
double column_fill(const ConvAttributes& attributes, const Image& image, int64_t width) {
  return volume(attributes.kernel) == 1 && image.out[1] == 1 ? 2.0 : 3.5 + 2.0 * static_cast<double>(width / (image.out[2] + 1));
}
constexpr double kFirstTouch = 1.0;  // of a vector that is read in place
constexpr double kTurn = 6;  // a vector, out of a panel or into one
double strip_fill(int64_t pieces) { return pieces == 1 ? 1.4 : 1.2 * static_cast<double>(pieces); }

// Panels that the output is cut into.
int64_t count_panels(const TileChoice& choice, const Image& image) {
  if (!choice.layout.strips) return ceil_div(pixels_of(image), choice.panel_width());
  const int64_t rows = ceil_div(image.out[1], choice.shape().vectors), columns = ceil_div(image.out[2], choice.isa->width / choice.pieces);
  return ceil_div(image.batch * rows * columns, choice.pieces);
}

// Vectors of the last panel that have pixels; strips are taken to be full.
int64_t last_vectors(const TileChoice& choice, const Image& image) {
  const int64_t rest = pixels_of(image) % choice.panel_width();
  return choice.layout.strips || rest == 0 ? choice.shape().vectors : ceil_div(rest, choice.isa->width);
}

// Cycles to fill a panel, and of all rows of the weight with it.
struct PanelCost {
  double fill, rows;
};
PanelCost panel_cost(const TileChoice& choice, const ConvAttributes& attributes, const Image& image, const Weights& weights,
                     int64_t vectors) {
  const bool strips = choice.layout.strips, direct = !strips && volume(image.out) % choice.panel_width() == 0;
  const double fill = strips                      ? strip_fill(choice.pieces)
                      : choice.layout.in_place() ? kFirstTouch
                                                 : column_fill(attributes, image, choice.isa->width);
  const double finish = direct ? 0.5 : 2.0 + static_cast<double>(choice.pieces);
  return {fill * static_cast<double>(choice.layout.lines() * choice.layout.height),
          panel_cycles(choice, weights, vectors) + finish * static_cast<double>(weights.rows() * choice.shape().vectors)};
}

double cycles(const TileChoice& choice, const ConvAttributes& attributes, const Image& image, const Weights& weights) {
  const auto cost = [&](int64_t vectors) {
    const PanelCost panel = panel_cost(choice, attributes, image, weights, vectors);
    return panel.fill + panel.rows;
  };
  return static_cast<double>(count_panels(choice, image) - 1) * cost(choice.shape().vectors) + cost(last_vectors(choice, image));
}

// Whether a 1×1 convolution reads more than the caches hold of what the layer before it wrote.
bool comes_from_memory(const ConvAttributes& attributes, const Image& image) {
  constexpr int64_t kFloatsInCaches = 1 << 21;
  return volume(attributes.kernel) == 1 && image.of * attributes.groups * attributes.inputs * volume(image.in) > kFloatsInCaches;
}

// Images of onnxruntime's own start at a cache line; those that a user gives it need not.
bool is_aligned(const Image& image) { return reinterpret_cast<uintptr_t>(image.x) % 64 == 0; }

// Whether panels of `width` pixels can be read where they are: a 1×1 convolution, whose images divide into such panels.
bool takes_in_place(const ConvAttributes& attributes, const Image& image, int64_t width) {
  return volume(attributes.kernel) == 1 && volume(attributes.strides) == 1 && image.in[2] == volume(image.in) && image.out == image.in &&
         volume(image.in) % width == 0 && is_aligned(image);
}

// Few pixels are turned into the tokens of a linear layer, a row of them at a time.
double pixel_cycles(const Isa& isa, const Image& image, const Weights& weights) {
  const double pixels = static_cast<double>(pixels_of(image)), lines = pixels / static_cast<double>(image.out[2]);
  return row_cycles(isa, weights, pixels_of(image)) + kTurn * (lines * static_cast<double>(weights.columns()) + static_cast<double>(weights.rows())) +
         0.2 * pixels * static_cast<double>(weights.columns());
}

// The choice with the fewest estimated cycles; none (no isa) where the row loops take fewer.
TileChoice choose_panels(const Isa* isa, const Weights& weights, const ConvAttributes& attributes, const Image& image) {
  TileChoice best{};
  double least = pixels_of(image) <= kMostByRows ? pixel_cycles(*isa, image, weights) : 0;
  const auto consider = [&](const TileChoice& choice) {
    const double cost = cycles(choice, attributes, image, weights);
    if (least == 0 || cost < least) least = cost, best = choice;
  };
  const Kernel kernel{attributes.kernel[1], attributes.kernel[2], attributes.dilations[1], attributes.strides[1]};
  for (const Isa* candidate : {isa, narrower(isa)})
    for (int tile = 0; candidate && tile < kTileCount; ++tile) {
      const int64_t vectors = candidate->tiles[tile].vectors, width = candidate->width;
      consider({candidate, tile, column_layout(weights.columns(), weights.density(), weights.hint(), vectors, width)});
      if (takes_in_place(attributes, image, vectors * width)) {
        const int64_t pitch = volume(image.in) / width;
        const Layout layout = in_place_layout(weights.columns(), weights.density(), weights.hint(), vectors, width, pitch);
        if (layout.fits()) consider({candidate, tile, layout});
      }
      if (!takes_strips(attributes, image)) continue;
      const Layout strips = strip_layout(attributes.inputs, kernel, weights.density(), weights.hint(), vectors, width);
      for (int64_t pieces = 1; strips.fits() && pieces <= 4; pieces *= 2) consider({candidate, tile, strips, pieces});
    }
  if (fits_amx(attributes, image) && takes_amx(isa, weights, amx_cycles(weights, attributes, image), least))
    return {isa, 0, {}, 1, amx_order(attributes)};
  return best;
}

// For every column of the weight, in the file's order, where it reads relative to the pixel.
const int64_t* column_offsets(const ConvAttributes& a, const Source& source, const std::vector<uint32_t>& order) {
  const int64_t columns = static_cast<int64_t>(order.size());
  int64_t* offsets = Scratch::mine().shared_offsets.at_least(2 * columns);
  int64_t *own = offsets + columns, *next = own;  // in the operator's order: to find them from `order` takes divisions
  for (int64_t channel = 0; channel < a.inputs; ++channel)
    for (int64_t z = 0; z < a.kernel[0]; ++z)
      for (int64_t y = 0; y < a.kernel[1]; ++y) {
        const int64_t row = channel * source.channel + z * a.dilations[0] * source.slice + y * a.dilations[1] * source.row;
        for (int64_t x = 0; x < a.kernel[2]; ++x) *next++ = row + source.column(x * a.dilations[2], a.strides[2]);
      }
  for (int64_t i = 0; i < columns; ++i) offsets[i] = own[order[i]];
  return offsets;
}

// For every line of a panel, where it reads relative to the pixel.
const int64_t* line_offsets(const ConvAttributes& a, const Layout& layout, const Source& source, const std::vector<uint32_t>& order) {
  if (!layout.strips) return column_offsets(a, source, order);
  int64_t *offsets = Scratch::mine().shared_offsets.at_least(layout.lines()), *next = offsets;
  for (int64_t channel = 0; channel < a.inputs; ++channel)
    for (int64_t remainder = 0; remainder < layout.kernel.remainders(); ++remainder)
      for (int64_t x = 0; x < a.kernel[2]; ++x)
        *next++ = channel * source.channel + remainder * layout.kernel.remainder_step() * source.row +
                  source.column(x * a.dilations[2], a.strides[2]);
  return offsets;
}

// One panel of pixels and a range of output channels.
struct Task {
  int64_t group, panel, row, rows;
};

// What a panel is filled from, and where its sums go: `to` counts from the first pixel of a channel, `from` floats of a row of sums.
struct Window {
  Segment *reads, *writes;
  Inside* inside;  // of strips
  int64_t read_count = 0, write_count = 0;
};

struct Run {
  const TileChoice& choice;
  const StreamPlan& plan;
  const ConvAttributes& attributes;
  const Image& image;
  const Source& source;
  const int64_t* lines;
  const Epilogue& epilogue;

  void operator()(const Task& task) const;
  Ahead ahead(int64_t chunk, const float* from) const;
  void find_columns(int64_t panel, Window& window) const;
  void find_strips(int64_t panel, Window& window) const;
  Inside inside(int64_t line, int64_t y, int64_t x) const;
  void fill_columns(const float* base, const int64_t* offsets, int64_t count, const Window& window, float* panel) const;
};

// The runs of output rows that the pixels of a panel lie in.
void Run::find_columns(int64_t panel, Window& window) const {
  const Triple& out = image.out;
  const int64_t size = volume(out), width = choice.panel_width(), first = panel * width;
  const int64_t count = std::min(width, pixels_of(image) - first);
  for (int64_t done = 0, length; done < count; done += length) {
    const int64_t n = (first + done) / size, pixel = (first + done) % size;
    const int64_t x = pixel % out[2], y = pixel / out[2] % out[1], z = pixel / out[2] / out[1];
    length = std::min(count - done, out[2] - x);
    const int64_t row = z * attributes.strides[0] * source.slice + y * attributes.strides[1] * source.row;
    window.reads[window.read_count++] = {n * source.image + row + x, done, length};
  }
  for (int64_t done = 0, length; done < count; done += length) {
    const int64_t n = (first + done) / size, pixel = (first + done) % size;
    length = std::min(count - done, size - pixel);
    window.writes[window.write_count++] = {done, n * attributes.outputs * size + pixel, length};
  }
}

// Of the outputs from (y, x) on, what a line of the first channel reads inside the image; all where the pads can be read.
Inside Run::inside(int64_t line, int64_t y, int64_t x) const {
  const int64_t lanes = choice.isa->width / choice.pieces, height = choice.layout.height;
  if (source.padded) return {0, static_cast<int32_t>(lanes), 0, static_cast<int32_t>(height)};
  const Kernel& kernel = choice.layout.kernel;
  const int64_t row = y * attributes.strides[1] + line / kernel.columns * kernel.remainder_step() - attributes.before[1];
  const int64_t column = x * attributes.strides[2] + line % kernel.columns * attributes.dilations[2] - attributes.before[2];
  // Of `count` places from `start` on, `stride` apart, those from 0 to size - 1.
  const auto between = [](int64_t start, int64_t stride, int64_t size, int64_t count) {
    const int64_t first = std::min(count, ceil_div(std::max<int64_t>(-start, 0), stride));
    return std::pair<int32_t, int32_t>(first, std::clamp(ceil_div(std::max<int64_t>(size - start, 0), stride), first, count));
  };
  const auto [left, right] = between(column, attributes.strides[2], image.in[2], lanes);
  const auto [first, last] = between(row, attributes.strides[1], image.in[1], height);
  return {left, right, first, last};
}

// The pieces that share the vectors of a panel; where there are none left, the first once more.
void Run::find_strips(int64_t panel, Window& window) const {
  const Triple& out = image.out;
  const int64_t vectors = choice.shape().vectors, width = choice.isa->width, lanes = width / choice.pieces;
  const int64_t across = ceil_div(out[2], lanes), down = ceil_div(out[1], vectors);
  for (int64_t piece = 0; piece < choice.pieces; ++piece) {
    const int64_t index = panel * choice.pieces + piece, n = index / across / down;
    const int64_t y = index / across % down * vectors, x = index % across * lanes;
    for (int64_t line = 0; line < choice.layout.channel_lines; ++line)
      window.inside[line * choice.pieces + piece] = n < image.batch ? inside(line, y, x) : window.inside[line * choice.pieces];
    if (n >= image.batch) {
      window.reads[window.read_count++] = window.reads[0];
      continue;
    }
    window.reads[window.read_count++] = {n * source.image + y * attributes.strides[1] * source.row + x * source.stride, piece * lanes, lanes};
    for (int64_t v = 0; v < std::min(vectors, out[1] - y); ++v)
      window.writes[window.write_count++] = {v * width + piece * lanes,
                                             n * attributes.outputs * volume(out) + (y + v) * out[2] + x, std::min(lanes, out[2] - x)};
  }
}

// Whole vectors, but for the lines where that would read beyond the end of the input; their offsets need not rise.
void Run::fill_columns(const float* base, const int64_t* offsets, int64_t count, const Window& window, float* panel) const {
  const int64_t width = choice.panel_width();
  int64_t end = 0;
  for (int64_t s = 0; s < window.read_count; ++s) end = std::max(end, window.reads[s].from + window.reads[s].count + choice.isa->width);
  const int64_t room = source.size - (base - source.data) - end;
  const bool all = *std::max_element(offsets, offsets + count) <= room;
  for (int64_t line = 0; line < count; ++line) {
    int64_t last = all ? count : line;
    while (last < count && offsets[last] <= room) ++last;
    choice.isa->gather(base, offsets + line, last - line, window.reads, window.read_count, panel + line * width, width);
    line = last;
    for (int64_t s = 0; line < count && s < window.read_count; ++s) {
      const Segment& read = window.reads[s];
      std::memcpy(panel + line * width + read.to, base + offsets[line] + read.from, read.count * 4);
    }
  }
}

// What is read next of an image: chunk `chunk` of the panel whose first pixel is at `from`, or the first one of the panel after it.
Ahead Run::ahead(int64_t chunk, const float* from) const {
  const Layout& layout = choice.layout;
  if (chunk == plan.chunks) chunk = 0, from += choice.panel_width();
  const int64_t line = chunk * layout.chunk_lines();
  return {from, lines + line, std::min(layout.chunk_lines(), layout.lines() - line)};
}

void Run::operator()(const Task& task) const {
  const Layout& layout = choice.layout;
  const int64_t width = choice.panel_width(), size = volume(image.out), channel = task.group * plan.rows + task.row;
  Scratch& scratch = Scratch::mine();
  float* panel = layout.in_place() ? nullptr : scratch.own_panel.at_least(layout.chunk_size() + width);
  float* sums = scratch.own_sums.at_least(task.rows * width);
  Segment* segments = scratch.own_segments.at_least(2 * width);
  Window window{segments, segments + width, scratch.own_inside.at_least(layout.channel_lines * choice.pieces)};
  layout.strips ? find_strips(task.panel, window) : find_columns(task.panel, window);
  const float* base = source.data + task.group * attributes.inputs * source.channel;
  const int64_t at = channel * size + window.writes[0].to;
  const bool direct = !layout.strips && window.writes[0].count == width;
  int64_t end = 0;  // of what is wanted of a row of sums
  for (int64_t i = 0; i < window.write_count; ++i) end = std::max(end, window.writes[i].from + window.writes[i].count);
  const Tile& tile = choice.narrowed(ceil_div(end, choice.isa->width));

  StreamJob job{};
  job.values = plan.values.data();
  job.offsets = plan.offsets.data();
  job.rows = task.rows;
  const bool whole = window.read_count == 1 && comes_from_memory(attributes, image);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t line = chunk * layout.chunk_lines(), count = std::min(layout.chunk_lines(), layout.lines() - line);
    job.panel = panel;
    if (layout.in_place()) {
      job.panel = base + lines[line] + window.reads[0].from;
    } else if (layout.strips) {
      const int64_t step = attributes.strides[1] * source.row;
      choice.isa->gather_strips({base, lines + line, count, window.reads, choice.pieces, layout.height, source.stride, step, window.inside,
                                 layout.channel_lines, panel});
    } else {
      fill_columns(base, lines + line, count, window, panel);
    }
    if (whole && !layout.strips) job.ahead = ahead(chunk + 1, base + window.reads[0].from);
    const bool first = chunk == 0, last = chunk + 1 == plan.chunks;
    job.blocks = plan.start(task.group, chunk, task.row / choice.shape().rows);
    job.order = plan.order(task.group, chunk, task.row);
    job.bias = first && image.bias ? image.bias + channel : nullptr;
    job.in = first ? nullptr : sums;
    job.in_stride = width;
    if (first && direct && image.residual) job.in = image.residual + at, job.in_stride = size;
    job.out = last && direct ? image.y + at : sums;
    job.out_stride = last && direct ? size : width;
    job.low = last && direct ? epilogue.low : -__builtin_inff();
    job.high = last && direct ? epilogue.high : __builtin_inff();
    tile.stream(job);
  }
  if (direct) {
    for (int64_t r = 0; r < task.rows; ++r) choice.isa->activate(image.y + at + r * size, width, epilogue.activation);
    return;
  }
  const float* residual = image.residual ? image.residual + channel * size : nullptr;
  choice.isa->finish({sums, width, task.rows, window.writes, window.write_count, residual, image.y + channel * size, size,
                      is_afar(attributes, image), epilogue.low, epilogue.high, epilogue.activation});
}

// Floats beyond the padded input that strips read where the output's rows do not fill the last panel.
int64_t strip_slack(const TileChoice& choice, const ConvAttributes& a, const Image& image) {
  if (!choice.layout.strips) return 0;
  const int64_t vectors = choice.shape().vectors, beyond = choice.layout.height - vectors;
  const int64_t last = (ceil_div(image.out[1], vectors) * vectors + beyond) * a.strides[1];
  const int64_t rows = std::max<int64_t>(0, last - image.in[1] - a.before[1] - a.after[1]) + 1;
  return rows * (image.in[2] + a.before[2] + a.after[2] + a.strides[2]) + 2 * choice.isa->width;
}

// Whether every image is a single pixel of a 1×1 convolution: a linear layer.
bool is_product(const ConvAttributes& a, const Image& image) {
  return a.groups == 1 && volume(image.out) == 1 && volume(image.in) == 1 && volume(a.kernel) == 1;
}

Streaming stream_image(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& attributes, const Image& image) {
  const Size size{image.batch, image.in[0], image.in[1], image.in[2], is_aligned(image) + 2 * !isa->amx};
  return weights.stream(packed, size, [&] { return choose_panels(isa, weights, attributes, image); });
}

void run_panels(const Isa* isa, const Weights& weights, const Streaming& streaming, const ConvAttributes& attributes, const Image& image,
                const Epilogue& epilogue, const Parallel& parallel) {
  const TileChoice& choice = streaming.choice;
  const int64_t rows = weights.rows(), panels = attributes.groups * count_panels(choice, image);
  const PanelCost cost = panel_cost(choice, attributes, image, weights, choice.shape().vectors);
  // Strips leave out the pads themselves, and every second column.
  const bool direct = choice.layout.strips && attributes.strides[2] <= 2;
  const Source source = direct ? unpadded_source(attributes, image)
                               : make_source(isa, attributes, image, strip_slack(choice, attributes, image), parallel);
  const int64_t* lines = line_offsets(attributes, choice.layout, source, weights.order());
  const Run run{choice, *streaming.plan, attributes, image, source, lines, epilogue};

  const int64_t useful = ceil_div(rows, kRowUnit);
  const int64_t wanted = row_splits(panels, parallel.threads(), cost.fill, cost.rows, useful);
  const int64_t per_task = ceil_div(ceil_div(rows, wanted), kRowUnit) * kRowUnit;
  const int64_t splits = ceil_div(rows, per_task), of_group = panels / attributes.groups;
  parallel(panels * splits, [&](int64_t index) {
    const int64_t row = index % splits * per_task;
    run({index / splits / of_group, index / splits % of_group, row, std::min(per_task, rows - row)});
  });
}

// Every pixel of the output as a token, through the row loops; their sums, turned round, go where panels' would.
void run_pixels(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& attributes, const Image& image,
                const Epilogue& epilogue, const Parallel& parallel) {
  const Source source = make_source(isa, attributes, image, 0, parallel);
  const Triple& out = image.out;
  const int64_t columns = weights.columns(), rows = weights.rows(), size = volume(out), pixels = pixels_of(image);
  const int64_t width = ceil_div(pixels, isa->width) * isa->width;
  Scratch& scratch = Scratch::mine();
  const int64_t* offsets = column_offsets(attributes, source, weights.order());
  float* tokens = scratch.shared_tokens.at_least(attributes.groups * pixels * columns);
  float* sums = scratch.shared_sums.at_least(pixels * rows + rows * width);
  float* turned = sums + pixels * rows;
  std::vector<Segment> writes;
  for (int64_t n = 0; n < image.batch; ++n) writes.push_back({n * size, n * attributes.outputs * size, size});
  // Of all groups, before the row loops take the memory of the source; a task for each row of pixels.
  const int64_t lines = pixels / out[2];
  parallel(attributes.groups * lines, [&](int64_t index) {
    const int64_t group = index / lines, line = index % lines, y = line % out[1], z = line / out[1] % out[0], n = line / out[1] / out[0];
    const int64_t first = n * source.image + group * attributes.inputs * source.channel + z * attributes.strides[0] * source.slice +
                          y * attributes.strides[1] * source.row;
    isa->turn_pixels(source.data + first, source.size - first, offsets, columns, out[2], tokens + index * out[2] * columns);
  });
  const Epilogue none{Activation::kNone, -__builtin_inff(), __builtin_inff()};
  for (int64_t group = 0; group < attributes.groups; ++group) {
    const float* bias = image.bias ? image.bias + group * rows : nullptr;
    run_rows(isa, weights, packed, group, {tokens + group * pixels * columns, pixels, bias, nullptr, sums}, none, parallel);
    isa->pack_tokens(sums, rows, pixels, rows, turned, width);
    const int64_t at = group * rows * size;
    isa->finish({turned, width, rows, writes.data(), image.batch, image.residual ? image.residual + at : nullptr, image.y + at, size, false,
                 epilogue.low, epilogue.high, epilogue.activation});
  }
}

void run_vectors(const Isa* isa, Weights& weights, const Packed& packed, const Streaming& streaming, const ConvAttributes& attributes,
                 const Image& image, const Epilogue& epilogue, const Parallel& parallel) {
  if (streaming.by_rows()) return run_pixels(isa, weights, packed, attributes, image, epilogue, parallel);
  run_panels(isa, weights, streaming, attributes, image, epilogue, parallel);
}

// Large images run one by one: each is still in the caches when its padded, strided or split copy is read.
constexpr int64_t kLargeImage = 512;  // pixels of the output
int64_t images_at_once(const Image& image) { return volume(image.out) < kLargeImage ? image.batch : 1; }

Image images(const ConvAttributes& a, const Image& all, int64_t first, int64_t count) {
  Image some = all;
  const int64_t inputs = a.groups * a.inputs * volume(all.in), outputs = a.outputs * volume(all.out);
  some.x += first * inputs;
  some.y += first * outputs;
  if (some.residual) some.residual += first * outputs;
  some.batch = count;
  return some;
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
  if (pixels_of(image) == 0) return;
  image.of = image.batch;
  const bool pointwise = flatten_pointwise(attributes, image);
  if (pointwise && is_product(attributes, image)) {
    const float* x = subsample(isa, given, given_image, parallel);
    return run_linear(isa, weights, packed, 0, {x, image.batch, image.bias, image.residual, image.y}, epilogue, parallel);
  }
  const int64_t at_once = images_at_once(image), parts = image.batch / at_once;
  const auto run = [&](int64_t part, const Parallel& threads) {
    Image some = images(attributes, image, part * at_once, at_once);
    if (pointwise) some.x = subsample(isa, given, images(given, given_image, part * at_once, at_once), threads);
    const Streaming streaming = stream_image(isa, weights, packed, attributes, some);
    if (streaming.amx && run_amx_conv(isa, *streaming.amx, attributes, some, epilogue, threads)) return;
    const Isa* vectors = streaming.amx ? isa_avx512() : isa;
    const Streaming by_vectors = streaming.amx ? stream_image(vectors, weights, packed, attributes, some) : streaming;
    run_vectors(vectors, weights, packed, by_vectors, attributes, some, epilogue, threads);
  };
  // Where that keeps all threads busy each takes whole images, and reads what it wrote itself in the layer before.
  if (parts > 1 && (parts % parallel.threads() == 0 || parts >= 4 * parallel.threads())) {
    parallel(parts, [&](int64_t part) { run(part, parallel.alone()); });
  } else {
    for (int64_t part = 0; part < parts; ++part) run(part, parallel);
  }
}

void prepare_conv(const Isa* isa, Weights& weights, const Packed& packed, const ConvAttributes& given, int64_t batch, const Triple& in) {
  ConvAttributes attributes = given;
  Image image{nullptr, nullptr, nullptr, nullptr, batch, in, conv_output(attributes, in)};
  double likely = static_cast<double>(batch);
  for (int64_t size : image.out) likely *= static_cast<double>(size);
  if (likely == 0 || likely > 1e10) return;  // what cannot run is not prepared for
  if (flatten_pointwise(attributes, image) && is_product(attributes, image)) return prepare_linear(isa, weights, packed, batch);
  image.batch = images_at_once(image);
  if (stream_image(isa, weights, packed, attributes, image).by_rows()) weights.few(packed, *isa);
}

}  // namespace nmconvert
