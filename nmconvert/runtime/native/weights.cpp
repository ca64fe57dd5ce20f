#include "weights.h"

#include <algorithm>
#include <cmath>

#include "elements.h"

namespace nmconvert {

constexpr size_t kMostSizes = 256;  // that choices are kept for
constexpr size_t kMostPlans = 8;    // each as large as the packed weight: images of other widths need others

Weights::Weights(const Isa* isa, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale)
    : is_row_(is_row), groups_(groups), hint_(hint), scale_(scale), decoded_(new SparseRows(decode(packed, is_row))) {
  if (decoded_->rows % groups) throw InvalidNode("the output channels do not divide into the groups");
  rows_ = decoded_->rows / groups;
  columns_ = decoded_->columns;
  density_ = static_cast<double>(decoded_->kept()) / (static_cast<double>(decoded_->rows) * columns_);
  digits_ = isa->amx ? weight_digits(packed.values, columns_) : 0;
  order_ = decoded_->order;
}

SparseRows Weights::take(const Packed& packed) {
  if (!decoded_) return decode(packed, is_row_);
  SparseRows matrix = std::move(*decoded_);
  decoded_.reset();
  return matrix;
}

void Weights::ready() {
  decoded_.reset();
  guessed_ = true;
}

// Before a plan is looked up for a run: a guess that was wrong gives back its memory.
void Weights::meet(bool known) {
  if (guessed_ && !known) {
    streams_.clear();
    amx_.clear();
    chosen_.clear();
    few_.clear();
  }
  guessed_ = false;
}

Streaming Weights::choose_and_plan(const Packed& packed, const Size& size, const TileChoice& choice) {
  if (chosen_.size() >= kMostSizes) chosen_.clear();
  if (!choice.isa) return chosen_[size] = {choice};
  if (choice.amx) {
    const AmxPlan* plan = plan_for(packed, *choice.amx);
    return chosen_[size] = {choice, nullptr, plan};
  }
  const Plan key{choice.isa, choice.tile, choice.layout.strips, choice.layout.pitch};
  meet(streams_.count(key) != 0);
  auto found = streams_.find(key);
  if (found == streams_.end()) {
    if (streams_.size() >= kMostPlans) streams_.clear(), chosen_.clear();
    std::vector<float> widened;
    const float* values = widen(packed.values, widened);
    auto plan = plan_stream(take(packed), values, {packed, scale_}, groups_, choice.shape().rows, choice.layout);
    found = streams_.emplace(key, std::make_shared<const StreamPlan>(std::move(plan))).first;
  }
  return chosen_[size] = {choice, found->second};
}

const AmxPlan* Weights::plan_for(const Packed& packed, const AmxOrder& order) {
  const std::pair<bool, int64_t> key{order.left, order.positions};
  meet(amx_.count(key) != 0);
  std::unique_ptr<AmxPlan>& plan = amx_[key];
  if (!plan) plan = std::make_unique<AmxPlan>(plan_amx(take(packed), packed.values, {packed, scale_}, groups_, digits_, order));
  return plan.get();
}

const RowPlan& Weights::few(const Packed& packed, const Isa& isa) {
  const std::lock_guard<std::mutex> lock(mutex_);
  meet(few_.count(&isa) != 0);
  std::unique_ptr<RowPlan>& plan = few_[&isa];
  if (!plan) {
    plan = std::make_unique<RowPlan>(plan_rows(take(packed), packed.values, {packed, scale_}, groups_, isa.width));
  }
  return *plan;
}

const Tile& TileChoice::narrowed(int64_t vectors) const {
  const Tile* best = &shape();
  for (const Tile& tile : isa->tiles)
    if (tile.rows == best->rows && tile.vectors >= vectors && tile.vectors < best->vectors) best = &tile;
  return *best;
}

namespace {

constexpr double kTranspose = 1.5;  // cycles to bring one vector of tokens into a panel
constexpr double kReturn = 2;       // and one vector of sums out of it

// Cycles of one kept entry against a tile: as measured on Zen 5, what two rows gain that share entries on Zen 4. A sum waits four
// cycles for itself.
double entry_cycles(const Tile& tile, int64_t width, double density) {
  const bool wide = width == 16, shares = tile.rows % 2 == 0;
  const double product = (wide ? 0.58 : 0.57) - (shares ? (wide ? 0.15 : 0.06) * density : 0);
  const double products = product * tile.vectors + (wide ? 0.3 : 0.1);
  return std::max(products, 4.0 / tile.rows) + 0.2;
}

}  // namespace

double panel_cycles(const TileChoice& choice, const Weights& weights, int64_t vectors) {
  const Tile& tile = choice.narrowed(vectors);
  const Layout& layout = choice.layout;
  const double entries = static_cast<double>(layout.columns) / static_cast<double>(layout.channels) * weights.density();
  const auto padded = [&](int64_t channels) { return kStep * std::ceil(static_cast<double>(channels) * entries / kStep - 1e-9); };
  const int64_t rest = layout.channels % layout.chunk;
  const double kept = static_cast<double>(layout.channels / layout.chunk) * padded(layout.chunk) + padded(rest);
  const double ends = static_cast<double>(layout.chunks()) * (1.5 * tile.vectors + 8.0 / tile.rows);
  const double rows = static_cast<double>(ceil_div(weights.rows(), tile.rows) * tile.rows);
  return rows * (kept * entry_cycles(tile, layout.width, weights.density()) + ends);
}

namespace {

// Cycles of the streaming loops for all tokens.
double stream_cycles(const TileChoice& choice, const Weights& weights, int64_t tokens) {
  const double a_vector = kTranspose * static_cast<double>(weights.columns()) + kReturn * static_cast<double>(weights.rows());
  const auto cycles = [&](int64_t vectors) { return panel_cycles(choice, weights, vectors) + choice.shape().vectors * a_vector; };
  const int64_t whole = tokens / choice.panel_width(), rest = tokens % choice.panel_width();
  return static_cast<double>(whole) * cycles(choice.shape().vectors) + (rest ? cycles(ceil_div(rest, choice.isa->width)) : 0);
}

}  // namespace

// As measured on Zen 5, with vectors of 8 floats on Zen 3, where a permutation across the halves delays the product as well: a vector of
// weights is read once for up to four tokens, and permuted for each.
double row_cycles(const Isa& isa, const Weights& weights, int64_t tokens) {
  const double density = weights.density();
  const RowBlocks blocks = row_blocks(weights.columns(), isa.width, [&](int size) {
    const double of = std::max<double>(size, static_cast<double>(weights.hint().m)) * density;  // any of a group may lie in a block
    return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(of - 1e-9)), 1, size);
  });
  const double vectors = static_cast<double>(ceil_div(weights.rows(), isa.width) * blocks.count * blocks.entries);
  const bool halves = blocks.columns > isa.width;
  const double once = isa.width == 16 ? 1.5 : 0.6;
  const double each = (isa.width == 8 ? (blocks.columns > 4 ? 1.9 : 1.2) : 0.65) * (halves ? 3 : 1);
  const int64_t passes = tokens / 4 + (tokens % 4 ? (tokens % 4 == 3 ? 2 : 1) : 0);
  return vectors * (once * static_cast<double>(passes) + each * static_cast<double>(tokens));
}

Estimate choose_tile(const Isa* isa, const Weights& weights, int64_t tokens) {
  TileChoice best{};
  double least = tokens <= kMostByRows ? row_cycles(*isa, weights, tokens) : 0;
  for (const Isa* candidate : {isa, narrower(isa)}) {
    for (int tile = 0; candidate && tile < kTileCount; ++tile) {
      const int vectors = candidate->tiles[tile].vectors;
      TileChoice choice{candidate, tile, column_layout(weights.columns(), weights.density(), weights.hint(), vectors, candidate->width)};
      const double cost = stream_cycles(choice, weights, tokens);
      if (least == 0 || cost < least) least = cost, best = std::move(choice);
    }
  }
  return {std::move(best), least};
}

}  // namespace nmconvert
