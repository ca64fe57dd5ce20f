// One node's weight: decoded once, prepacked for each tile that its inputs turn out to need.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>

#include "parallel.h"
#include "prepack.h"

namespace nmconvert {

class Weights {
 public:
  // Decodes `packed`, whose row dimensions are `is_row`, and checks it. Throws InvalidNode.
  Weights(const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale);

  // The plan for tile `index` on `isa`; `packed` is read where it has to be made.
  const StreamPlan& stream(const Packed& packed, const Isa& isa, int index);
  const RowPlan& few(const Packed& packed, const Isa& isa);
  // The session is made: what follows are runs, and the first decides whether plans made so far, on a guess, are kept.
  void ready();

  int64_t rows() const { return rows_; }        // of one group
  int64_t columns() const { return columns_; }  // of one group
  double density() const { return density_; }
  Hint hint() const { return hint_; }
  const std::vector<uint32_t>& order() const { return order_; }

 private:
  using Plan = std::pair<const Isa*, int>;
  SparseRows take(const Packed& packed);
  void meet(bool known);

  std::vector<bool> is_row_;
  int64_t groups_, rows_, columns_;
  Hint hint_;
  float scale_;
  double density_;
  std::vector<uint32_t> order_;
  std::mutex mutex_;
  std::unique_ptr<SparseRows> decoded_;  // until the first plan is made, or the session
  bool guessed_ = false;                 // the plans are those of a likely input, and nothing has run yet
  std::map<Plan, std::unique_ptr<StreamPlan>> streams_;
  std::map<const Isa*, std::unique_ptr<RowPlan>> few_;
};

// The inner loop that a product runs through.
struct TileChoice {
  const Isa* isa;
  int tile;
  const Tile& shape() const { return isa->tiles[tile]; }
  int64_t row_unit() const { return std::lcm<int64_t>(16, shape().rows); }  // what rows are split into multiples of
  int64_t panel_width() const { return int64_t{shape().vectors} * isa->width; }
};

// The tile that takes the fewest estimated cycles for `width` tokens or pixels; `fill` is the cost of bringing one vector of
// the panel in.
TileChoice choose_tile(const Isa* isa, const Weights& weights, int64_t width, double fill);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace nmconvert
