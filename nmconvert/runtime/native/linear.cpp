#include "linear.h"

#include <algorithm>

#include "amx_run.h"

namespace nmconvert {
namespace {

constexpr int64_t kSmallestTask = 1 << 14;  // multiplications
constexpr int64_t kFew = 4;                 // tokens, that are never streamed
constexpr int64_t kRowsAtOnce = 12 * kRowUnit;  // whose sums stay in the L1 cache on their way out

// Few tokens: lanes are output rows, and every weight is read once.
void run_few(const Isa* isa, const RowPlan& plan, int64_t rows, int64_t columns, int64_t group, const Tokens& tokens,
             const Epilogue& epilogue, const Parallel& parallel) {
  const float* x = tokens.x;
  if (plan.padded_columns > columns) {
    float* padded = Scratch::mine().shared_input.at_least(tokens.tokens * plan.padded_columns);
    for (int64_t t = 0; t < tokens.tokens; ++t) {
      std::copy_n(tokens.x + t * columns, columns, padded + t * plan.padded_columns);
      std::fill_n(padded + t * plan.padded_columns + columns, plan.padded_columns - columns, 0.0f);
    }
    x = padded;
  }
  const int64_t work = plan.entries() * isa->width * tokens.tokens;
  const int64_t per_task = std::max({ceil_div(plan.blocks, parallel.parts()), ceil_div(kSmallestTask, work), int64_t{1}});
  parallel(ceil_div(plan.blocks, per_task), [&](int64_t task) {
    RowJob job{};
    job.first_block = task * per_task;
    job.last_block = std::min(plan.blocks, job.first_block + per_task);
    job.values = plan.values(group * plan.blocks * plan.entries() * isa->width);
    job.storage = plan.storage;
    job.scales = plan.scaled ? plan.scales.data() + group * plan.blocks * isa->width : nullptr;
    job.positions = plan.positions.data() + group * plan.blocks * plan.words * isa->width;
    job.words = plan.words;
    job.rows = rows;
    job.blocks_per_word = plan.blocks_per_word;
    job.words_per_block = plan.words_per_block;
    job.block = plan.block;
    job.x_stride = plan.padded_columns;
    job.bias = tokens.bias;
    job.out_stride = rows;
    job.low = epilogue.low;
    job.high = epilogue.high;
    for (int64_t t = 0; t < tokens.tokens; t += job.tokens) {
      job.tokens = tokens.tokens - t >= 4 ? 4 : tokens.tokens - t >= 2 ? 2 : 1;
      job.x = x + t * plan.padded_columns;
      job.residual = tokens.residual ? tokens.residual + t * rows : nullptr;
      job.out = tokens.y + t * rows;
      isa->rows(job);
    }
    const int64_t first = job.first_block * isa->width, last = std::min(rows, job.last_block * isa->width);
    for (int64_t t = 0; t < tokens.tokens; ++t) isa->activate(tokens.y + t * rows + first, last - first, epilogue.activation);
  });
}

// Many tokens: panels of tokens as columns, through which the weights stream.
struct Stream {
  const TileChoice& choice;
  const StreamPlan& plan;
  int64_t group;
  const Tokens& tokens;
  const Epilogue& epilogue;

  int64_t valid(int64_t panel) const { return std::min(choice.panel_width(), tokens.tokens - panel * choice.panel_width()); }

  // Columns `first` … of a panel, which starts at `to`.
  void pack(int64_t panel, int64_t first, int64_t count, float* to) const {
    const int64_t width = choice.panel_width(), columns = choice.layout.columns;
    choice.isa->pack_tokens(tokens.x + panel * width * columns + first, columns, valid(panel), count, to + first * width, width);
  }

  // `count` rows from `row` on, of what is packed.
  void multiply(int64_t panel, const float* packed, int64_t row, int64_t count) const {
    const int64_t width = choice.panel_width(), at = panel * width * plan.rows + row;
    float* sums = Scratch::mine().own_sums.at_least(count * width);
    StreamJob job{};
    job.values = plan.values.data();
    job.offsets = plan.offsets.data();
    job.rows = count;
    job.in_stride = job.out_stride = width;
    job.out = sums;
    job.low = -__builtin_inff();
    job.high = __builtin_inff();
    const Tile& tile = choice.narrowed(ceil_div(valid(panel), choice.isa->width));
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      job.blocks = plan.start(group, chunk, row / choice.shape().rows);
      job.order = plan.order(group, chunk, row);
      job.panel = packed + chunk * choice.layout.chunk * width;
      job.in = chunk ? sums : nullptr;
      job.bias = chunk || !tokens.bias ? nullptr : tokens.bias + row;
      tile.stream(job);
    }
    choice.isa->unpack_tokens(sums, width, count, valid(panel), tokens.residual ? tokens.residual + at : nullptr, tokens.y + at, plan.rows,
                              epilogue.low, epilogue.high);
    for (int64_t t = 0; t < valid(panel); ++t) choice.isa->activate(tokens.y + at + t * plan.rows, count, epilogue.activation);
  }
};

void run_stream(const TileChoice& choice, const StreamPlan& plan, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
                double density, const Parallel& parallel) {
  const Stream stream{choice, plan, group, tokens, epilogue};
  const int64_t width = choice.panel_width(), columns = choice.layout.columns, rows = plan.rows;
  const int64_t panels = ceil_div(tokens.tokens, width);
  if (panels >= parallel.parts()) {  // enough for all threads: each fills its own, and nobody waits for it
    parallel(panels, [&](int64_t panel) {
      float* packed = Scratch::mine().own_panel.at_least(columns * width);
      stream.pack(panel, 0, columns, packed);
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) stream.multiply(panel, packed, row, std::min(kRowsAtOnce, rows - row));
    });
    return;
  }
  float* packed = Scratch::mine().shared_input.at_least(panels * columns * width);
  const int64_t part = std::max<int64_t>(64, ceil_div(ceil_div(kSmallestTask, width), 16) * 16);
  const int64_t parts = ceil_div(columns, part);
  parallel(panels * parts, [&](int64_t task) {
    const int64_t panel = task / parts, column = task % parts * part;
    stream.pack(panel, column, std::min(part, columns - column), packed + panel * columns * width);
  });

  const double row_work = static_cast<double>(columns * width) * density;
  int64_t per_task = std::max(ceil_div(rows * panels, parallel.parts()), static_cast<int64_t>(kSmallestTask / row_work));
  per_task = std::max<int64_t>(kRowUnit, ceil_div(std::min(per_task, rows), kRowUnit) * kRowUnit);
  const int64_t splits = ceil_div(rows, per_task);
  parallel(panels * splits, [&](int64_t task) {
    const int64_t panel = task / splits, row = task % splits * per_task;
    stream.multiply(panel, packed + panel * columns * width, row, std::min(per_task, rows - row));
  });
}

// What `tokens` run through; no plan where by the row loops.
Streaming stream_tokens(const Isa* isa, Weights& weights, const Packed& packed, int64_t tokens) {
  if (tokens <= kFew) return {};
  return weights.stream(packed, {tokens, 0, 0, 0, 0}, [&] {
    const auto [choice, cycles] = choose_tile(isa, weights, tokens);
    if (!takes_amx(isa, weights, amx_cycles(weights, tokens), cycles)) return choice;
    return TileChoice{isa, 0, {}, 1, amx_order(weights)};
  });
}

}  // namespace

void run_rows(const Isa* isa, Weights& weights, const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
              const Parallel& parallel) {
  run_few(isa, weights.few(packed, *isa), weights.rows(), weights.columns(), group, tokens, epilogue, parallel);
}

void run_linear(const Isa* isa, Weights& weights, const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
                const Parallel& parallel) {
  if (tokens.tokens == 0) return;
  const Streaming streaming = stream_tokens(isa, weights, packed, tokens.tokens);
  if (streaming.amx) return run_amx_linear(isa, *streaming.amx, group, tokens, epilogue, parallel);
  if (streaming.by_rows()) return run_rows(isa, weights, packed, group, tokens, epilogue, parallel);
  run_stream(streaming.choice, *streaming.plan, group, tokens, epilogue, weights.density(), parallel);
}

void prepare_linear(const Isa* isa, Weights& weights, const Packed& packed, int64_t tokens) {
  if (stream_tokens(isa, weights, packed, tokens).by_rows()) weights.few(packed, *isa);
}

}  // namespace nmconvert
