// One node's weight: decoded once, prepacked for each tile that its inputs turn out to need.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "amx_plan.h"
#include "parallel.h"
#include "prepack.h"

namespace nmconvert {

// The inner loop that a product runs through, and what it finds in its panels.
struct TileChoice {
  const Isa* isa;
  int tile;
  Layout layout;
  int64_t pieces = 1;  // strips: output rows that share a vector
  std::optional<AmxOrder> amx = {};  // the matrix unit instead, and how it takes the weights
  const Tile& shape() const { return isa->tiles[tile]; }
  int64_t panel_width() const { return int64_t{shape().vectors} * isa->width; }
  // The narrowest tile that goes through the same plan, and computes the first `vectors` of a panel.
  const Tile& narrowed(int64_t vectors) const;
};

struct Streaming {
  TileChoice choice;
  std::shared_ptr<const StreamPlan> plan{};  // of a run, also where another one needs its room meanwhile
  const AmxPlan* amx = nullptr;  // the matrix unit's
  bool by_rows() const { return !plan && !amx; }
};

// Tokens, or the batch and extent of images and whether they start at a vector.
using Size = std::array<int64_t, 5>;

class Weights {
 public:
  // Decodes `packed`, whose row dimensions are `is_row`, and checks it. Throws InvalidNode.
  Weights(const Isa* isa, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale);

  // The tile for inputs of a size, which `choose()` finds where the size is new, and its plan, made from `packed`.
  template <typename Choose>
  Streaming stream(const Packed& packed, const Size& size, Choose choose) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = chosen_.find(size);
    if (known != chosen_.end()) return guessed_ = false, known->second;
    return choose_and_plan(packed, size, choose());
  }
  const RowPlan& few(const Packed& packed, const Isa& isa);
  // The session is made: what follows are runs, and the first decides whether plans made so far, on a guess, are kept.
  void ready();

  int64_t rows() const { return rows_; }        // of one group
  int64_t columns() const { return columns_; }  // of one group
  double density() const { return density_; }
  int digits() const { return digits_; }  // on the matrix unit; 0 where it does not take them
  Hint hint() const { return hint_; }
  const std::vector<uint32_t>& order() const { return order_; }

 private:
  using Plan = std::tuple<const Isa*, int, bool, int64_t>;
  SparseRows take(const Packed& packed);
  Streaming choose_and_plan(const Packed& packed, const Size& size, const TileChoice& choice);
  const AmxPlan* plan_for(const Packed& packed, const AmxOrder& order);
  void meet(bool known);

  std::vector<bool> is_row_;
  int64_t groups_, rows_, columns_;
  Hint hint_;
  float scale_;
  double density_;
  int digits_;
  std::vector<uint32_t> order_;
  std::mutex mutex_;
  std::unique_ptr<SparseRows> decoded_;  // until the first plan is made, or the session
  bool guessed_ = false;                 // the plans are those of a likely input, and nothing has run yet
  std::map<Size, Streaming> chosen_;
  std::map<Plan, std::shared_ptr<const StreamPlan>> streams_;
  std::map<std::pair<bool, int64_t>, std::unique_ptr<AmxPlan>> amx_;
  std::map<const Isa*, std::unique_ptr<RowPlan>> few_;
};

// Tokens, or pixels, that the row loops may be chosen for.
constexpr int64_t kMostByRows = 32;
// Estimated cycles of the row loops.
double row_cycles(const Isa& isa, const Weights& weights, int64_t tokens);
// Estimated cycles of all rows of `weights` for the first `vectors` of one panel.
double panel_cycles(const TileChoice& choice, const Weights& weights, int64_t vectors);
// A choice and its estimated cycles.
struct Estimate {
  TileChoice choice;
  double cycles;
};
// The tile that takes the fewest cycles for `tokens`; none (no isa) where the row loops take fewer.
Estimate choose_tile(const Isa* isa, const Weights& weights, int64_t tokens);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace nmconvert
