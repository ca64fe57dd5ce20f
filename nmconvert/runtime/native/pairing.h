// Which rows of a weight advance together in a tile: those that keep the most columns in common.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "matrix.h"

namespace nmconvert {

// The columns that each row keeps in each chunk of a panel, as bits.
class KeptColumns {
 public:
  KeptColumns(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks);

  // Calls visit(entry, column) for what a row keeps in a chunk, in the file's order.
  template <typename Visit>
  void each_entry(int64_t chunk, int64_t row, Visit visit) const {
    const uint32_t* firsts = firsts_.data() + row * static_cast<int64_t>(spans_.size());
    for (const uint32_t span : of_chunk_[chunk]) matrix_.each_entry(row, spans_[span].first, spans_[span].end, firsts[span], visit);
  }

  // A bit for each column of a chunk, set where a row keeps it.
  const uint64_t* bits(int64_t row, int64_t chunk) const { return bits_.data() + (row * chunks_ + chunk) * words_; }
  // 1 where that of the column `number` is set, else 0.
  static uint32_t keeps(const uint64_t* bits, uint32_t number) { return bits[number / 64] >> number % 64 & 1; }
  int64_t most() const { return words_ * 64; }  // columns of a chunk, or more

  // Entries that a row keeps in a chunk, and those of them that another keeps, too.
  uint32_t kept(int64_t chunk, int64_t row) const { return shared(chunk, row, row); }
  uint32_t shared(int64_t chunk, int64_t row, int64_t other) const;

  // The `count` rows from `first` on, a unit or what there is of one, as a tile takes them in a chunk: in pairs that share much.
  void match(int64_t chunk, int64_t first, int64_t count, uint8_t* order) const;

 private:
  // Columns that follow each other in the file and lie in one chunk, where the first has `number`.
  struct Span {
    uint32_t chunk, first, end, number;
  };

  const SparseRows& matrix_;
  int64_t chunks_, words_;
  std::vector<Span> spans_;
  std::vector<std::vector<uint32_t>> of_chunk_;  // its spans
  std::vector<uint32_t> firsts_;                 // [rows][spans]: entries
  std::vector<uint64_t> bits_;                   // [rows][chunks][words], and a word more
};

}  // namespace nmconvert
