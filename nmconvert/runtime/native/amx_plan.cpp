#include "amx_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

int32_t bits_of(const float& value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Of absolute values. Integers of the same order, so that the compiler takes several at a time.
float largest_of(const std::vector<float>& floats) {
  int32_t largest = 0;
  for (const float& value : floats) largest = std::max(largest, bits_of(value) & INT32_MAX);
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// The kept entries of a row, by their place: its weights as integers, in three digits if there are several.
class Row {
 public:
  // Returns the power of two that makes the weights integers.
  float read(const SparseRows& matrix, const std::vector<uint32_t>& places, const float* values, int64_t row, int digits) {
    const uint32_t first = matrix.starts[row], count = matrix.starts[row + 1] - first;
    place_.resize(count), whole_.resize(count), floats_.resize(count);
    matrix.each_entry(row, [&](uint32_t entry, uint32_t column) { place_[entry - first] = places[column]; });
    if (matrix.source.empty()) {
      std::copy_n(values + first, count, floats_.data());
    } else {
      for (uint32_t i = 0; i < count; ++i) floats_[i] = values[matrix.source[first + i]];
    }
    const float scale = digits > 1 ? digit_scale(largest_of(floats_)) : 1;
    for (uint32_t i = 0; i < count; ++i) {
      const float value = floats_[i] * scale;
      whole_[i] = static_cast<int32_t>(value + std::copysign(0.5f, value));
    }
    if (!std::is_sorted(place_.begin(), place_.end())) sort();
    met_ = 0;
    return scale;
  }

  // Of the entries before `end` that come next: a bit for the place of each from `begin` on, and visit(that place, its weight).
  uint64_t bits(uint32_t begin, uint32_t end) const {
    uint64_t found = 0;
    for (size_t i = met_; i < place_.size() && place_[i] < end; ++i) found |= uint64_t{1} << (place_[i] - begin);
    return found;
  }
  template <typename Visit>
  void pass(uint32_t begin, uint32_t end, Visit visit) {
    size_t i = met_;
    for (const size_t count = place_.size(); i < count && place_[i] < end; ++i) visit(place_[i] - begin, whole_[i]);
    met_ = i;
  }

 private:
  // All rows of a layer on the kernel axis come here: no comparisons.
  void sort() {
    const uint32_t words = *std::max_element(place_.begin(), place_.end()) / 64 + 1;
    taken_.assign(words, 0);
    at_place_.resize(64 * words);
    for (size_t i = 0; i < place_.size(); ++i) {
      taken_[place_[i] / 64] |= uint64_t{1} << place_[i] % 64;
      at_place_[place_[i]] = whole_[i];
    }
    size_t next = 0;
    for (uint32_t word = 0; word < words; ++word)
      for (uint64_t left = taken_[word]; left; left &= left - 1, ++next) {
        place_[next] = 64 * word + static_cast<uint32_t>(__builtin_ctzll(left));
        whole_[next] = at_place_[place_[next]];
      }
  }

  std::vector<uint32_t> place_;
  std::vector<int32_t> whole_;
  std::vector<float> floats_;
  size_t met_ = 0;  // entries that were passed
  std::vector<uint64_t> taken_;
  std::vector<int32_t> at_place_;
};

// The entries of a tile, which come next in its rows: sets the masks of its lines, appends the digits of its values.
template <int Digits>
void plan_tile(AmxPlan& plan, Row* rows, int64_t count, uint32_t begin, uint64_t* masks, uint32_t& kept) {
  constexpr uint64_t kQuad = 0xf;
  const bool left = plan.order.left;
  const uint32_t end = begin + kTileColumns;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = rows[i].bits(begin, end);
    if (left) masks[i] = bits;
    for (int line = 0; !left && line < kTileLines; ++line) masks[line] |= (bits >> 4 * line & kQuad) << 4 * i;
  }
  int8_t* next[kTileLines];  // where the next value of a line goes: those of a line follow one another
  for (int line = 0; line < kTileLines; ++line) {
    next[line] = plan.values.data() + kept;
    kept += static_cast<uint32_t>(__builtin_popcountll(masks[line]));
  }
  const int64_t digit = plan.kept;
  for (int64_t i = 0; i < count; ++i)
    rows[i].pass(begin, end, [&](uint32_t place, int32_t whole) {
      int8_t* at = next[left ? i : place / 4]++;
      const int32_t bytes = Digits > 1 ? (whole + 0x8080) ^ 0x8080 : whole * (1 << 16);  // the highest digit first
      for (int d = 0; d < Digits; ++d) at[d * digit] = static_cast<int8_t>(bytes >> (16 - 8 * d));
    });
}

}  // namespace

int weight_digits(const Constant& values, int64_t columns) {
  constexpr int64_t kLargest = int64_t{kDigits} << 14;  // of a column's part in the lowest sum
  if (columns > INT32_MAX / kLargest) return 0;
  if (values.type == ort::kInt8) return 1;
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  constexpr int32_t kInfinity = 0x7f800000;
  int32_t infinite = 0;
  for (int64_t i = 0, count = values.size(); i < count; ++i) infinite |= (bits_of(floats[i]) & kInfinity) == kInfinity;
  return infinite ? 0 : kDigits;
}

float digit_scale(float largest) {
  constexpr int kHighest = 120;  // so that its inverse is a normal float
  int exponent;                  // the next power of two, of one that leaves room for three digits of 127
  std::frexp(largest * 1.004, &exponent);
  return std::ldexp(1.f, largest > 0 ? std::min(23 - exponent, kHighest) : 0);
}

AmxPlan plan_amx(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int digits,
                 const AmxOrder& order) {
  AmxPlan plan;
  plan.order = order;
  plan.rows = matrix.rows / groups;
  plan.tiles = (plan.rows + kTileLines - 1) / kTileLines;
  plan.digits = digits;
  plan.kept = matrix.kept();
  const int64_t tiles = groups * plan.tiles * order.steps();
  uint64_t* masks = plan.masks.at_least(tiles * kTileLines);
  uint32_t* starts = plan.starts.at_least(tiles);
  float* of_sums = plan.scales.at_least(groups * plan.tiles * kTileLines);
  plan.values.at_least(int64_t{digits} * plan.kept);
  std::vector<uint32_t> places;
  for (uint32_t column : matrix.order) places.push_back(static_cast<uint32_t>(order.place(column / order.positions, column % order.positions)));
  std::vector<float> widened;
  const float* floats = widen(values, widened);
  Row rows[kTileLines];
  uint32_t kept = 0;
  for (int64_t tile = 0; tile < groups * plan.tiles; ++tile) {
    const int64_t within = tile % plan.tiles * kTileLines, first = tile / plan.tiles * plan.rows + within;
    const int64_t count = std::min<int64_t>(kTileLines, plan.rows - within);
    for (int64_t i = 0; i < count; ++i) {
      const float scale = rows[i].read(matrix, places, floats, first + i, digits);
      of_sums[tile * kTileLines + i] = scales.of(first + i) / scale * (digits > 1 ? 1 << 16 : 1);
    }
    for (int64_t step = 0; step < order.steps(); ++step, masks += kTileLines) {
      *starts++ = kept;
      (digits > 1 ? plan_tile<kDigits> : plan_tile<1>)(plan, rows, count, static_cast<uint32_t>(step * kTileColumns), masks, kept);
    }
  }
  return plan;
}

}  // namespace nmconvert
