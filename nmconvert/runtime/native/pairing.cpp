#include "pairing.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace nmconvert {

KeptColumns::KeptColumns(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks)
    : matrix_(matrix), chunks_(chunks), of_chunk_(chunks) {
  uint16_t last = 0;
  for (uint32_t column = 0; column < places.size(); ++column) {
    const Layout::Place& place = places[column];
    last = std::max(last, place.number);
    if (spans_.empty() || place.chunk != spans_.back().chunk) {
      of_chunk_[place.chunk].push_back(static_cast<uint32_t>(spans_.size()));
      spans_.push_back({place.chunk, column, column, place.number});
    }
    spans_.back().end = column + 1;
  }
  words_ = last / 64 + 1;
  bits_.resize(matrix.rows * chunks * words_ + 1);
  firsts_.reserve(matrix.rows * spans_.size());
  for (int64_t row = 0; row < matrix.rows; ++row) {
    uint32_t entry = matrix.starts[row];
    for (const Span& span : spans_) {
      firsts_.push_back(entry);
      uint64_t* bits = bits_.data() + (row * chunks_ + span.chunk) * words_;
      for (uint32_t first = span.first, number = span.number; first < span.end; first += 64, number += 64) {
        const uint64_t piece = matrix.piece(row, first, std::min<uint32_t>(64, span.end - first));
        set_bits(bits, number, piece);
        entry += static_cast<uint32_t>(__builtin_popcountll(piece));
      }
    }
  }
}

uint32_t KeptColumns::shared(int64_t chunk, int64_t row, int64_t other) const {
  const uint64_t *a = bits(row, chunk), *b = bits(other, chunk);
  uint32_t count = 0;
  for (int64_t word = 0; word < words_; ++word) count += __builtin_popcountll(a[word] & b[word]);
  return count;
}

// Each row that has no partner yet takes the best of those after it. Rows too short to share a step stay as they are.
void KeptColumns::match(int64_t chunk, int64_t first, int64_t count, uint8_t* order) const {
  uint32_t longest = 0;
  for (int64_t row = first; row < first + count; ++row) longest = std::max(longest, kept(chunk, row));
  if (longest < kStep) return std::iota(order, order + count, 0);
  std::array<uint8_t, kRowUnit> left;
  std::iota(left.begin(), left.end(), 0);
  for (; count > 0; count -= 2) {
    *order++ = left[0];
    if (count == 1) return;
    int64_t best = 1;
    uint32_t most = 0;
    for (int64_t i = 1; i < count; ++i) {
      const uint32_t common = shared(chunk, first + left[0], first + left[i]);
      if (common > most) most = common, best = i;
    }
    *order++ = left[best];
    std::copy(left.begin() + best + 1, left.begin() + count, left.begin() + best);
    std::copy(left.begin() + 1, left.begin() + count - 1, left.begin());
  }
}

}  // namespace nmconvert
