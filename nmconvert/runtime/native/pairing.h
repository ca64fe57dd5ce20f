// Which rows of a weight advance together in a tile: those that keep the most columns in common.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "matrix.h"

namespace nmconvert {

// Calls visit(chunk, first, last) for every run of entries of `row` that lie in one chunk.
template <typename Visit>
void each_run(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t row, Visit visit) {
  for (uint32_t first = matrix.starts[row], last = first, end = matrix.starts[row + 1]; first < end; first = last) {
    const uint32_t chunk = places[matrix.column[first]].chunk;
    while (last < end && places[matrix.column[last]].chunk == chunk) ++last;
    visit(chunk, first, last);
  }
}

// The columns that each row keeps in each chunk of a panel, as bits.
class KeptColumns {
 public:
  KeptColumns(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks);

  // Bit `number` of a row in a chunk says whether it keeps that column there.
  const uint64_t* bits(int64_t row, int64_t chunk) const { return bits_.data() + (row * chunks_ + chunk) * words_; }
  static uint32_t at(const uint64_t* bits, uint32_t number) { return bits[number / 64] >> number % 64 & 1; }

  // Entries that a row keeps in a chunk, and those of them that another keeps, too.
  uint32_t kept(int64_t chunk, int64_t row) const { return shared(chunk, row, row); }
  uint32_t shared(int64_t chunk, int64_t row, int64_t other) const;

  // The `count` rows from `first` on, a unit or what there is of one, as a tile takes them in a chunk: in pairs that share much.
  void match(int64_t chunk, int64_t first, int64_t count, uint8_t* order) const;

 private:
  int64_t chunks_, words_;
  std::vector<uint64_t> bits_;  // [rows][chunks][words]
};

}  // namespace nmconvert
