#include "weights.h"

#include <algorithm>

#include "elements.h"

namespace nmconvert {

Weights::Weights(const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale)
    : is_row_(is_row), groups_(groups), hint_(hint), scale_(scale), decoded_(new SparseRows(decode(packed, is_row))) {
  if (decoded_->rows % groups) throw InvalidNode("the output channels do not divide into the groups");
  rows_ = decoded_->rows / groups;
  columns_ = decoded_->columns;
  density_ = static_cast<double>(decoded_->column.size()) / (static_cast<double>(decoded_->rows) * columns_);
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
    few_.clear();
  }
  guessed_ = false;
}

const StreamPlan& Weights::stream(const Packed& packed, const Isa& isa, int index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  meet(streams_.count({&isa, index}) != 0);
  std::unique_ptr<StreamPlan>& plan = streams_[{&isa, index}];
  if (!plan) {
    std::vector<float> widened;
    const Tile& tile = isa.tiles[index];
    plan = std::make_unique<StreamPlan>(
        plan_stream(take(packed), widen(packed.values, widened), scale_, groups_, tile.rows, tile.vectors * isa.width, hint_));
  }
  return *plan;
}

const RowPlan& Weights::few(const Packed& packed, const Isa& isa) {
  const std::lock_guard<std::mutex> lock(mutex_);
  meet(few_.count(&isa) != 0);
  std::unique_ptr<RowPlan>& plan = few_[&isa];
  if (!plan) {
    plan = std::make_unique<RowPlan>(plan_rows(take(packed), packed.values, scale_, groups_, isa.width));
  }
  return *plan;
}

namespace {

constexpr double kLine = 16;  // floats in a cache line

// Cycles of one kept entry against a tile, as measured on Zen 5.
double entry_cycles(const Isa& isa, const Tile& tile) {
  const double products = isa.width == 16 ? 0.58 * tile.vectors + 0.3 : 0.57 * tile.vectors + 0.1;
  return std::max(products, 4.0 / tile.rows) + 4 / kLine;  // a sum waits four cycles for itself; six bytes of weight stream in
}

}  // namespace

TileChoice choose_tile(const Isa* isa, const Weights& weights, int64_t width, double fill) {
  TileChoice best{isa, 0};
  double least = 0;
  for (const Isa* candidate : {isa, narrower(isa)}) {
    if (!candidate) continue;
    for (int tile = 0; tile < kTileCount; ++tile) {
      const int vectors = candidate->tiles[tile].vectors;
      const int64_t panel_width = int64_t{vectors} * candidate->width;
      const int64_t chunk = chunk_columns(weights.columns(), panel_width, weights.hint());
      const double chunks = static_cast<double>(ceil_div(weights.columns(), chunk));
      const double panels = static_cast<double>(ceil_div(width, panel_width));
      const double row = static_cast<double>(weights.columns()) * weights.density() * entry_cycles(*candidate, candidate->tiles[tile]) +
                         chunks * (4.0 * static_cast<double>(panel_width) / kLine + 8);
      const double cost = panels * (static_cast<double>(weights.rows()) * row + fill * vectors * static_cast<double>(weights.columns()));
      if (least == 0 || cost < least) {
        least = cost;
        best = {candidate, tile};
      }
    }
  }
  return best;
}

}  // namespace nmconvert
