#include <algorithm>
#include <cmath>

#include "amx_run.h"
#include "source.h"

namespace nmconvert {
namespace {

constexpr int64_t kBlock = 2;              // weight tiles whose sums are on their way out at a time
constexpr int64_t kMostPixels = 1024;      // of a panel, so that its sums stay in the L2 cache, too
constexpr int64_t kFewestPixels = 128;     // of a panel that an image is cut into for several threads
constexpr int64_t kParts = 4;              // panels that each of these should have, because cores are not equally fast
constexpr int64_t kRangeTask = 1 << 14;    // floats
constexpr double kMostOfMean = 128;        // of what pixels are on average, the largest: seven of 23 bits; networks have up to 50
// Cycles of sixteen: inputs whose range is found, quads, quads that are staged, sums.
constexpr double kRange = 2, kFill = 30, kStage = 8, kFinish = 3;

// Where the pixels of a panel stand: quads of channels, each with a plane for every remainder of its rows and columns modulo the
// stride. Planes are flat, one image after the other, and rows end in the zeros that the next row begins with; so that what a
// kernel position reads for sixteen outputs in a row is contiguous, and lies as far from them as it does anywhere else.
// Outputs are counted in the same way: those that fall on the zeros between rows are computed, and dropped.
struct Flat {
  int64_t pitch, rows;    // of a plane of one image
  int64_t across, down;   // remainders modulo the stride
  int64_t reach;          // from an output to the last that it reads
  int64_t total;          // outputs of all images

  int64_t planes() const { return across * down; }
  int64_t image() const { return pitch * rows; }
};

int64_t extent(int64_t in, int64_t before, int64_t after, int64_t stride, int64_t out) {
  const int64_t size = stride == 1 ? in + std::max(before, after) : ceil_div(in + before + after, stride);
  return std::max(size, out);
}

Flat flatten(const ConvAttributes& a, const Image& image) {
  Flat flat{};
  flat.pitch = extent(image.in[2], a.before[2], a.after[2], a.strides[2], image.out[2]);
  flat.rows = extent(image.in[1], a.before[1], a.after[1], a.strides[1], image.out[1]);
  flat.across = a.strides[2];
  flat.down = a.strides[1];
  flat.reach = (a.kernel[1] - 1) * a.dilations[1] / a.strides[1] * flat.pitch + (a.kernel[2] - 1) * a.dilations[2] / a.strides[2];
  flat.total = (image.batch - 1) * flat.image() + (image.out[1] - 1) * flat.pitch + image.out[2];
  return flat;
}

// How the outputs are cut: panels whose pixels stay in the L2 cache, of a multiple of two tiles.
struct Cut {
  int64_t panels, width;
  int64_t staged() const { return width + kTileLines; }  // from line to line of a staged panel
};

Cut cut(const Flat& flat, const AmxOrder& order, int64_t groups, int64_t threads) {
  constexpr int64_t kTwo = 2 * kTileLines;
  const int64_t flat_bytes = order.quads() * kDigits * 4 * flat.planes(), bytes = order.positions > 1 ? order.lines() * kDigits * 4 : 0;
  const int64_t room = amx_panel_bytes() / 2 - flat_bytes * flat.reach;
  const int64_t most = std::clamp(room / (flat_bytes + bytes) / kTwo * kTwo, kTwo * 2, kMostPixels);
  int64_t panels = ceil_div(flat.total, most);
  const int64_t wanted = kParts * threads;
  if (threads > 1 && panels * groups < wanted) panels = std::max(panels, std::min(wanted, flat.total / kFewestPixels));
  const int64_t width = ceil_div(ceil_div(flat.total, panels), kTwo) * kTwo;
  return {ceil_div(flat.total, width), width};
}

// Sixteen lines of a tile do not displace each other in the L1 cache: planes lie an odd number of cache lines apart.
int64_t quad_size(const Flat& flat, int64_t width) {
  const int64_t lines = ceil_div(flat.planes() * (width + flat.reach), kTileLines) | 1;
  return lines * kTileLines;
}

// Sixteen rows of the weight against so many pixels, and a panel filled.
double tile_row_cycles(const AmxOrder& order, int digits, int64_t pixels) {
  return amx_tile_cycles(digits, order.steps(), ceil_div(pixels, kTileLines));
}
double fill_cycles(const Flat& flat, const Cut& cuts, const AmxOrder& order) {
  const double filled = static_cast<double>(order.quads() * quad_size(flat, cuts.width)) * kFill;
  return (filled + (order.positions > 1 ? static_cast<double>(order.lines() * cuts.width) * kStage : 0)) / kTileLines;
}

double conv_cycles(const AmxOrder& order, int64_t rows, int digits, const Flat& flat, int64_t groups) {
  const Cut cuts = cut(flat, order, groups, 1);
  const double products = static_cast<double>(ceil_div(rows, kTileLines)) * tile_row_cycles(order, digits, flat.total);
  const double filled = static_cast<double>(cuts.panels) * fill_cycles(flat, cuts, order);
  const double read = static_cast<double>(order.channels * flat.total) * kRange;
  return static_cast<double>(groups) * (products + filled + (read + static_cast<double>(rows * flat.total) * kFinish) / kTileLines);
}

// The scale of all pixels, or 0 where some are not finite or most are too small for it.
float pixel_scale(const Amx& amx, const float* x, int64_t count, const Parallel& parallel) {
  const int64_t tasks = ceil_div(count, kRangeTask);  // whatever the number of threads, for the same sum
  float* ranges = Scratch::mine().shared_sums.at_least(2 * tasks);
  parallel(tasks, [&](int64_t task) {
    const Range range = amx.range(x + task * kRangeTask, std::min(kRangeTask, count - task * kRangeTask));
    ranges[2 * task] = range.largest, ranges[2 * task + 1] = range.sum;
  });
  float largest = 0;
  double sum = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    if (!std::isfinite(ranges[2 * task])) return 0;
    largest = std::max(largest, ranges[2 * task]);
    sum += ranges[2 * task + 1];
  }
  return largest * static_cast<double>(count) <= kMostOfMean * sum ? digit_scale(largest) : 0;
}

struct Run {
  const Isa* isa;
  const AmxPlan& plan;
  const ConvAttributes& attributes;
  const Image& image;
  const Epilogue& epilogue;
  const Source& source;
  bool padded;  // the source is a copy with its zeros in place
  Flat flat;
  Cut cuts;
  int64_t quads;
  float scale;                   // of the pixels
  const float *scales, *biases;  // of the sums: [group][16 · tiles]
  const int64_t* reads_at;       // of every kernel position, quads from a pixel to what it reads; null where there is only one

  int64_t plane() const { return cuts.width + flat.reach; }
  int64_t quad() const { return quad_size(flat, cuts.width); }
  void operator()(int64_t group, int64_t panel, int64_t tile, int64_t last) const;
  int64_t find_reads(int64_t first, Segment* reads) const;
  int64_t find_writes(int64_t first, Segment* writes) const;
  void fill(int64_t group, int64_t first, Segment* reads, uint32_t* digits) const;
  void stage(const uint32_t* pixels, uint32_t* digits) const;
  AmxJob job(int64_t group, int64_t tile, int64_t tiles, const uint32_t* pixels) const;
};

// The runs of pixels, and of zeros, that the planes of a panel are filled from.
int64_t Run::find_reads(int64_t first, Segment* reads) const {
  int64_t count = 0;
  const int64_t before = padded ? 0 : attributes.before[2], above = padded ? 0 : attributes.before[1];
  const int64_t width = source.phase ? source.phase : image.in[2];  // of a row, or of those of its pixels with one remainder
  const int64_t height = padded ? image.in[1] + attributes.before[1] + attributes.after[1] : image.in[1];
  for (int64_t down = 0; down < flat.down; ++down)
    for (int64_t across = 0; across < flat.across; ++across) {
      const int64_t to = (down * flat.across + across) * plane();
      for (int64_t done = 0, length; done < plane(); done += length) {
        const int64_t at = first + done, n = at / flat.image(), y = at / flat.pitch % flat.rows, x = at % flat.pitch;
        const int64_t row = y * flat.down + down - above;
        length = std::min(plane() - done, flat.pitch - x);
        int64_t from = -1;
        if (n < image.batch && row >= 0 && row < height && x < before + width) {
          if (x < before) {
            length = std::min(length, before - x);
          } else {
            length = std::min(length, before + width - x);
            from = n * source.image + row * source.row + across * source.phase + x - before;
          }
        }
        Segment* previous = count ? &reads[count - 1] : nullptr;
        const bool goes_on = previous && previous->to + previous->count == to + done &&
                             (from < 0 ? previous->from < 0 : previous->from >= 0 && previous->from + previous->count == from);
        if (goes_on) {
          previous->count += length;
        } else {
          reads[count++] = {from, to + done, length};
        }
      }
    }
  return count;
}

// Where the outputs of a panel go.
int64_t Run::find_writes(int64_t first, Segment* writes) const {
  int64_t count = 0;
  const int64_t size = volume(image.out), end = std::min(first + cuts.width, flat.total);
  for (int64_t at = first, length; at < end; at += length) {
    const int64_t n = at / flat.image(), y = at / flat.pitch % flat.rows, x = at % flat.pitch;
    length = std::min(end - at, flat.pitch - x);
    const int64_t valid = y < image.out[1] ? std::min(length, image.out[2] - x) : 0;
    if (valid <= 0) continue;
    const int64_t to = n * attributes.outputs * size + y * image.out[2] + x;
    Segment* previous = count ? &writes[count - 1] : nullptr;
    if (previous && previous->from + previous->count == at - first && previous->to + previous->count == to) {
      previous->count += valid;
    } else {
      writes[count++] = {at - first, to, valid};
    }
  }
  return count;
}

// The pixels of a panel, in quads that lie quad() apart.
void Run::fill(int64_t group, int64_t first, Segment* reads, uint32_t* digits) const {
  const int64_t count = find_reads(first, reads), channels = attributes.inputs;
  const float* base = source.data + group * channels * source.channel;
  const Segment zeros{-1, 0, flat.planes() * plane()};
  for (int64_t c = 0; c < 4 * quads; c += 4, digits += quad()) {
    const float* of_quad[4] = {};
    for (int64_t i = 0; i < 4 && c + i < channels; ++i) of_quad[i] = base + (c + i) * source.channel;
    const bool any = of_quad[0];
    isa->amx->split_quads(of_quad, any ? reads : &zeros, any ? count : 1, scale, digits, quads * quad() * 4);
  }
}

// What every kernel position reads of them, from the start of a cache line on: a tile that is not so aligned takes the time of seven.
void Run::stage(const uint32_t* pixels, uint32_t* digits) const {
  const int64_t line = cuts.staged(), lines = plan.order.steps() * kTileLines;
  for (int64_t d = 0; d < kDigits; ++d, pixels += quads * quad()) {
    for (int64_t position = 0; position < plan.order.positions; ++position)
      for (int64_t q = 0; q < quads; ++q, digits += line) std::copy_n(pixels + q * quad() + reads_at[position], cuts.width, digits);
    for (int64_t i = plan.order.lines(); i < lines; ++i, digits += line) std::fill_n(digits, cuts.width, 0);
  }
}

// What does not depend on where sums go.
AmxJob Run::job(int64_t group, int64_t tile, int64_t tiles, const uint32_t* pixels) const {
  const int64_t at = plan.index(group, tile), row = (group * plan.tiles + tile) * kTileLines;
  const int64_t line = 4 * (reads_at ? cuts.staged() : quad());
  AmxJob job{};
  job.masks = plan.masks.data() + at * kTileLines;
  job.starts = plan.starts.data() + at;
  job.values = plan.values.data();
  job.kept = plan.kept;
  job.inputs = pixels;
  job.digit = plan.order.steps() * kTileLines * line;
  job.line = line;
  job.tile = 64;
  job.step = kTileLines * line;
  job.steps = plan.order.steps();
  job.unpacked = Scratch::mine().own_unpacked.at_least(unpacked_bytes(plan));
  job.line_scales = scales + row;
  job.bias = biases + row;
  job.lines = std::min(tiles * kTileLines, plan.rows - tile * kTileLines);
  job.lefts = tiles;
  return job;
}

void Run::operator()(int64_t group, int64_t panel, int64_t tile, int64_t last) const {
  Scratch& own = Scratch::mine();
  const int64_t first = panel * cuts.width, count = std::min(cuts.width, flat.total - first), size = volume(image.out);
  const int64_t most = flat.planes() * (plane() / flat.pitch + 2) * 3;  // segments
  Segment* segments = own.own_segments.at_least(2 * most);
  uint32_t* pixels = own.own_quads.at_least(kDigits * quads * quad());
  fill(group, first, segments, pixels);
  if (reads_at) {
    uint32_t* staged = own.own_staged.at_least(kDigits * plan.order.steps() * kTileLines * cuts.staged());
    stage(pixels, staged);
    pixels = staged;
  }
  const Segment* writes = segments + most;
  const int64_t write_count = find_writes(first, segments + most);
  const bool direct = write_count == 1 && writes->count == count;
  float* sums = direct ? nullptr : own.own_sums.at_least(kBlock * kTileLines * cuts.width);
  for (; tile < last; tile += kBlock) {
    const int64_t tiles = std::min(kBlock, last - tile), at = (group * plan.rows + tile * kTileLines) * size;
    AmxJob job = this->job(group, tile, tiles, pixels);
    job.rights = ceil_div(count, kTileLines);
    job.columns = count;
    if (direct) {
      job.residual = image.residual ? image.residual + at + writes->to : nullptr;
      job.low = epilogue.low, job.high = epilogue.high, job.activation = epilogue.activation;
      job.out = image.y + at + writes->to;
      job.out_line = size;
    } else {
      job.low = -__builtin_inff(), job.high = __builtin_inff();
      job.out = sums;
      job.out_line = cuts.width;
    }
    isa->amx->multiply_left[plan.digits > 1](job);
    if (!direct)
      isa->finish({sums, cuts.width, job.lines, writes, write_count, image.residual ? image.residual + at : nullptr, image.y + at, size,
                   is_afar(attributes, image), epilogue.low, epilogue.high, epilogue.activation});
  }
}

}  // namespace

bool fits_amx(const ConvAttributes& a, const Image& image) {
  return image.in[0] * a.kernel[0] * image.out[0] == 1 && a.before[0] + a.after[0] == 0 && volume(a.strides) <= volume(a.kernel);
}

AmxOrder amx_order(const ConvAttributes& attributes) { return {true, attributes.inputs, volume(attributes.kernel)}; }

double amx_cycles(const Weights& weights, const ConvAttributes& attributes, const Image& image) {
  return conv_cycles(amx_order(attributes), weights.rows(), weights.digits(), flatten(attributes, image), attributes.groups) + 1000;
}

bool run_amx_conv(const Isa* isa, const AmxPlan& plan, const ConvAttributes& attributes, const Image& image, const Epilogue& epilogue,
                  const Parallel& parallel) {
  const bool padded = volume(attributes.strides) > 1;
  const Flat flat = flatten(attributes, image);
  const int64_t channel = volume(image.in), steps = plan.order.steps();
  const int64_t quads = plan.order.positions > 1 ? plan.order.quads() : steps * kTileLines;
  const int64_t size = channel * attributes.groups * attributes.inputs;  // of an image
  const float scale = pixel_scale(*isa->amx, image.x, image.batch * size, parallel);
  if (scale == 0) return false;
  const Source source = padded ? make_source(isa, attributes, image, 0, parallel)
                               : Source{image.x, 0, size, channel, channel, image.in[2], 0};
  const Cut cuts = cut(flat, plan.order, attributes.groups, parallel.threads());
  Run run{isa, plan, attributes, image, epilogue, source, padded, flat, cuts, quads, scale, nullptr, nullptr, nullptr};
  const int64_t lines = attributes.groups * plan.tiles * kTileLines;
  float *scales = Scratch::mine().shared_scales.at_least(2 * lines), *biases = scales + lines;
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t group = i / (plan.tiles * kTileLines), row = i % (plan.tiles * kTileLines);
    scales[i] = plan.scales.data()[i] * ((1 << 16) / scale);
    biases[i] = image.bias && row < plan.rows ? image.bias[group * plan.rows + row] : 0;
  }
  run.scales = scales;
  run.biases = biases;
  if (plan.order.positions > 1) {
    int64_t* next = Scratch::mine().shared_offsets.at_least(plan.order.positions);
    run.reads_at = next;
    for (int64_t ky = 0; ky < attributes.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < attributes.kernel[2]; ++kx) {
        const int64_t y = ky * attributes.dilations[1], x = kx * attributes.dilations[2];
        const int64_t plane = y % flat.down * flat.across + x % flat.across;
        *next++ = plane * run.plane() + y / flat.down * flat.pitch + x / flat.across;
      }
  }
  const int64_t blocks = ceil_div(plan.tiles, kBlock);
  const double rows = static_cast<double>(plan.tiles) * tile_row_cycles(plan.order, plan.digits, cuts.width);
  const int64_t wanted = row_splits(attributes.groups * cuts.panels, parallel.threads(), fill_cycles(flat, cuts, plan.order), rows, blocks);
  const int64_t share = ceil_div(blocks, wanted) * kBlock, splits = ceil_div(plan.tiles, share);
  parallel(attributes.groups * cuts.panels * splits, [&](int64_t index) {
    const int64_t tile = index % splits * share;
    run(index / splits / cuts.panels, index / splits % cuts.panels, tile, std::min(plan.tiles, tile + share));
  });
  return true;
}

}  // namespace nmconvert
