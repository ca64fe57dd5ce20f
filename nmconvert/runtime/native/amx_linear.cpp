#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "amx_run.h"

namespace nmconvert {
namespace {

constexpr int64_t kBlock = 2;              // weight tiles, of which a task has a multiple
constexpr int64_t kSplitTask = 1 << 14;    // floats
constexpr int64_t kSmallestTask = 1 << 7;  // products of tiles

// Bytes of a token's digits: an odd number of cache lines, so that sixteen of them do not displace each other.
int64_t line_bytes(int64_t columns) { return (ceil_div(columns, kTileColumns) | 1) * 64; }

int64_t panel_tokens(int64_t columns) {
  constexpr int64_t kTwo = 2 * kTileLines;
  return std::max(kTwo, amx_panel_bytes() / (kDigits * line_bytes(columns)) / kTwo * kTwo);
}

}  // namespace

int64_t amx_panel_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t l2 = 0;
#endif
  return std::clamp<int64_t>(l2, 1 << 20, 4 << 20) / 8 * 5;
}

// Neighbours on the same core take more from the unit than from the vectors: it has to be the faster by a tenth.
bool takes_amx(const Isa* isa, const Weights& weights, double cycles, double otherwise) {
  return isa->amx && weights.digits() && (isa->always_amx || cycles < 0.9 * otherwise);
}

// As measured on Emerald Rapids, in the cycles of panel_cycles(): of a product, and of its sums. Input tiles come in pairs; one alone
// waits for its weights.
double amx_tile_cycles(int digits, int64_t steps, int64_t inputs) {
  const double each = digits == 1 ? 110 : 185, alone = digits == 1 ? 40 : 20, sums = 100;
  return static_cast<double>(inputs) * (static_cast<double>(steps) * each + sums) + (inputs % 2 ? static_cast<double>(steps) * alone : 0);
}

AmxOrder amx_order(const Weights& weights) { return {false, weights.columns()}; }

double amx_cycles(const Weights& weights, int64_t tokens) {
  const double tiles = static_cast<double>(ceil_div(weights.rows(), kTileLines));
  const double moved = static_cast<double>(tokens * (weights.columns() + 3 * weights.rows())) / 8;
  return tiles * amx_tile_cycles(weights.digits(), amx_order(weights).steps(), ceil_div(tokens, kTileLines)) + moved + 500;
}

void run_amx_linear(const Isa* isa, const AmxPlan& plan, int64_t group, const Tokens& tokens, const Epilogue& epilogue,
                    const Parallel& parallel) {
  const Amx& amx = *isa->amx;
  const int64_t columns = plan.order.channels, rows = plan.rows, steps = plan.order.steps();
  const int64_t line = line_bytes(columns), padded = ceil_div(tokens.tokens, kTileLines) * kTileLines;
  Scratch& scratch = Scratch::mine();
  const int64_t digit = padded * line;
  int8_t* digits = scratch.shared_digits.at_least(kDigits * digit);
  float* scales = scratch.shared_scales.at_least(padded);
  const int64_t of_task = std::max<int64_t>(1, kSplitTask / columns);
  parallel(ceil_div(padded, of_task), [&](int64_t task) {
    for (int64_t t = task * of_task; t < std::min(padded, (task + 1) * of_task); ++t) {
      const float *x = tokens.x + t * columns, largest = t < tokens.tokens ? amx.range(x, columns).largest : 0;
      const float scale = digit_scale(std::isfinite(largest) ? largest : 0);
      scales[t] = std::isfinite(largest) ? (1 << 16) / scale : largest - largest;  // NaN
      amx.split(x, t < tokens.tokens ? columns : 0, steps * kTileColumns, scale, digits + t * line, digit);
    }
  });
  float* biases = scratch.shared_sums.at_least(plan.tiles * kTileLines);
  std::fill_n(std::copy_n(tokens.bias, tokens.bias ? rows : 0, biases), plan.tiles * kTileLines - (tokens.bias ? rows : 0), 0.f);

  const int64_t most = panel_tokens(columns), panels = ceil_div(padded, most);
  const int64_t width = std::min(padded, ceil_div(ceil_div(padded, panels), 2 * kTileLines) * 2 * kTileLines);  // tokens of a panel
  const int64_t together = width > kTileLines ? kBlock : 2 * kBlock;
  const int64_t blocks = ceil_div(plan.tiles, together), work = together * steps * width / kTileLines;
  const int64_t per_task = std::max(ceil_div(blocks * panels, parallel.parts()), std::min(blocks, kSmallestTask / work));
  const int64_t splits = ceil_div(blocks, std::max<int64_t>(1, std::min(per_task, blocks)));
  const int64_t share = ceil_div(blocks, splits);
  parallel(panels * splits, [&](int64_t task) {
    const int64_t first_token = task / splits * width, count = std::min(width, padded - first_token);
    if (count <= 0) return;
    const int64_t last = std::min(plan.tiles, (task % splits + 1) * share * together), valid = std::min(tokens.tokens - first_token, count);
    const int64_t tile = task % splits * share * together, tiles = last - tile;
    if (tiles <= 0) return;
    const int64_t at = plan.index(group, tile), row = tile * kTileLines, to = first_token * rows + row;
    AmxJob job{};
    job.masks = plan.masks.data() + at * kTileLines;
    job.starts = plan.starts.data() + at;
    job.values = plan.values.data();
    job.kept = plan.kept;
    job.inputs = digits + first_token * line;
    job.digit = digit;
    job.line = line;
    job.tile = kTileLines * line;
    job.step = kTileColumns;
    job.steps = steps;
    job.unpacked = Scratch::mine().own_unpacked.at_least(unpacked_bytes(plan));
    job.line_scales = scales + first_token;
    job.column_scales = plan.scales.data() + group * plan.tiles * kTileLines + row;
    job.bias = biases + row;
    job.residual = tokens.residual ? tokens.residual + to : nullptr;
    job.low = epilogue.low, job.high = epilogue.high, job.activation = epilogue.activation;
    job.out = tokens.y + to;
    job.out_line = rows;
    job.lines = valid;
    job.columns = std::min(tiles * kTileLines, rows - row);
    job.lefts = count / kTileLines;
    job.rights = tiles;
    amx.multiply_right[plan.digits > 1](job);
  });
}

}  // namespace nmconvert
