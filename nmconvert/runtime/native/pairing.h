// Which rows of a weight advance together in a tile: those that keep the most columns in common.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "matrix.h"

namespace nmconvert {

// The rows of one unit, and the columns that they keep in each chunk of a panel, as bits.
class Pairing {
 public:
  Pairing(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks);

  // What follows is about `count` rows from `first` on.
  void meet(int64_t first, int64_t count);

  // Rows of the unit in a chunk, as a tile takes them: in pairs that share much, or as they stand.
  void match(int64_t chunk, uint8_t* order) const;
  void keep_order(uint8_t* order) const;

  // Entries that a row keeps in a chunk, and those of them that another keeps, too; of a row with itself all.
  uint32_t shared(int64_t chunk, int64_t row, int64_t other) const;
  uint32_t kept(int64_t chunk, int64_t row) const { return shared(chunk, row, row); }
  // Whether a row of the unit keeps a column.
  uint32_t keeps(int64_t row, uint32_t column) const { return bits_[row * stride_ + bit_[column] / 64] >> bit_[column] % 64 & 1; }

  // Calls visit(chunk, first, last) for every run of entries of `row`, of all rows, that lie in one chunk.
  template <typename Visit>
  void runs(int64_t row, Visit visit) const {
    for (uint32_t first = matrix_.starts[row], last = first, end = matrix_.starts[row + 1]; first < end; first = last) {
      const uint32_t chunk = places_[matrix_.column[first]].chunk;
      while (last < end && places_[matrix_.column[last]].chunk == chunk) ++last;
      visit(chunk, first, last);
    }
  }

 private:
  const SparseRows& matrix_;
  const std::vector<Layout::Place>& places_;
  int64_t count_ = 0;
  int64_t words_ = 0, stride_ = 0;  // of a chunk, of a row
  std::vector<uint32_t> bit_;       // of every column, within a row
  std::vector<uint64_t> bits_;      // [kRowUnit][chunks][words]
};

}  // namespace nmconvert
