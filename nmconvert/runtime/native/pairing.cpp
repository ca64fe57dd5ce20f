#include "pairing.h"

#include <algorithm>
#include <numeric>

namespace nmconvert {

constexpr int64_t kWord = 64;  // bits

Pairing::Pairing(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t chunks)
    : matrix_(matrix), places_(places), bit_(matrix.columns) {
  std::vector<uint32_t> next(chunks);
  for (int64_t column = 0; column < matrix.columns; ++column) bit_[column] = next[places[column].chunk]++;
  words_ = (*std::max_element(next.begin(), next.end()) + kWord - 1) / kWord;
  stride_ = chunks * words_;
  for (int64_t column = 0; column < matrix.columns; ++column) bit_[column] += places[column].chunk * words_ * kWord;
  bits_.resize(kRowUnit * stride_);
}

void Pairing::meet(int64_t first, int64_t count) {
  count_ = count;
  std::fill(bits_.begin(), bits_.end(), 0);
  for (int64_t row = 0; row < count; ++row) {
    uint64_t* bits = bits_.data() + row * stride_;
    uint64_t word = 0;  // of columns that follow each other, in a register
    uint32_t at = 0;
    for (uint32_t entry = matrix_.starts[first + row]; entry < matrix_.starts[first + row + 1]; ++entry) {
      const uint32_t bit = bit_[matrix_.column[entry]];
      if (bit / kWord != at) bits[at] |= word, word = 0, at = bit / kWord;
      word |= uint64_t{1} << bit % kWord;
    }
    bits[at] |= word;
  }
}

// Each row that has no partner yet takes the best of those after it.
void Pairing::match(int64_t chunk, uint8_t* order) const {
  std::array<uint8_t, kRowUnit> left;
  std::iota(left.begin(), left.end(), 0);
  for (int64_t rows = count_; rows > 0; rows -= 2) {
    *order++ = left[0];
    if (rows == 1) return;
    int64_t best = 1;
    uint32_t most = 0;
    for (int64_t i = 1; i < rows; ++i) {
      const uint32_t common = shared(chunk, left[0], left[i]);
      if (common > most) most = common, best = i;
    }
    *order++ = left[best];
    std::copy(left.begin() + best + 1, left.begin() + rows, left.begin() + best);
    std::copy(left.begin() + 1, left.begin() + rows - 1, left.begin());
  }
}

void Pairing::keep_order(uint8_t* order) const { std::iota(order, order + count_, 0); }

uint32_t Pairing::shared(int64_t chunk, int64_t row, int64_t other) const {
  const uint64_t *a = bits_.data() + row * stride_ + chunk * words_, *b = bits_.data() + other * stride_ + chunk * words_;
  uint32_t count = 0;
  for (int64_t word = 0; word < words_; ++word) count += __builtin_popcountll(a[word] & b[word]);
  return count;
}

}  // namespace nmconvert
