#include "pairing.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace nmconvert {

KeptColumns::KeptColumns(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks) : chunks_(chunks) {
  uint16_t last = 0;
  for (const Layout::Place& place : places) last = std::max(last, place.number);
  words_ = last / 64 + 1;
  bits_.resize(matrix.rows * chunks * words_);
  for (int64_t row = 0; row < matrix.rows; ++row)
    each_run(matrix, places, row, [&](uint32_t chunk, uint32_t first, uint32_t end) {
      uint64_t *bits = bits_.data() + (row * chunks_ + chunk) * words_, word = 0;  // of columns that follow each other, in a register
      uint32_t at = 0;
      for (uint32_t entry = first; entry < end; ++entry) {
        const uint32_t number = places[matrix.column[entry]].number;
        if (number / 64 != at) bits[at] |= word, word = 0, at = number / 64;
        word |= uint64_t{1} << number % 64;
      }
      bits[at] |= word;
    });
}

uint32_t KeptColumns::shared(int64_t chunk, int64_t row, int64_t other) const {
  const uint64_t *a = bits(row, chunk), *b = bits(other, chunk);
  uint32_t count = 0;
  for (int64_t word = 0; word < words_; ++word) count += __builtin_popcountll(a[word] & b[word]);
  return count;
}

// Each row that has no partner yet takes the best of those after it.
void KeptColumns::match(int64_t chunk, int64_t first, int64_t count, uint8_t* order) const {
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
