#include "prepack.h"

#include <algorithm>
#include <numeric>

#include "elements.h"
#include "ort_abi.h"
#include "pairing.h"

namespace nmconvert {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kLinesAhead = 3;  // of the values that a row has in the next chunk

// Calls visit(group, row, count) for every unit of rows, with its first row in the group.
template <typename Visit>
void each_unit(const StreamPlan& plan, int64_t groups, Visit visit) {
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t row = 0; row < plan.rows; row += kRowUnit) visit(group, row, std::min<int64_t>(kRowUnit, plan.rows - row));
}

// The row in a block's pair beside the one at `position` of a unit; the row itself where it is alone.
uint8_t partner(const uint8_t* order, int64_t position, int64_t count) { return order[(position ^ 1) < count ? position ^ 1 : position]; }

// Steps that a block takes, as long as the longest of its rows: in all, and those that its pairs can share.
struct Length {
  uint32_t steps, shared;
};

// Of the blocks of a unit, whose first row is `row`, in a chunk.
void add_lengths(const KeptColumns& columns, const uint8_t* order, int64_t chunk, int64_t row, int64_t count, int tile_rows,
                 std::vector<Length>& lengths) {
  for (int64_t position = 0; position < count; position += tile_rows) {
    uint32_t kept = 0, shared = tile_rows % 2 ? 0 : UINT32_MAX;
    for (int64_t i = position; i < std::min(position + tile_rows, count); ++i) {
      kept = std::max(kept, columns.kept(chunk, row + order[i]));
      shared = std::min(shared, columns.shared(chunk, row + order[i], row + partner(order, i, count)));
    }
    lengths.push_back({static_cast<uint32_t>(ceil_div(kept, kStep)), shared / kStep});
  }
}

// Places the blocks of a chunk from `step` on. All but an eighth of them share the same steps: a loop that always runs as often is
// foreseen. Returns the first step of the next chunk.
uint64_t place_blocks(const std::vector<Length>& lengths, Block* block, uint64_t step) {
  std::vector<uint32_t> shared(lengths.size());
  std::transform(lengths.begin(), lengths.end(), shared.begin(), [](const Length& length) { return length.shared; });
  const auto usual = shared.begin() + shared.size() / 8;
  std::nth_element(shared.begin(), usual, shared.end());
  for (const Length& length : lengths) {
    *block++ = {static_cast<uint32_t>(step), static_cast<uint32_t>(step + std::min(length.shared, *usual))};
    step += length.steps;
  }
  if (step > UINT32_MAX) throw InvalidNode("the weight is too large");
  *block = {static_cast<uint32_t>(step), static_cast<uint32_t>(step)};
  return step;
}

// Fills plan.orders and plan.starts; returns the steps in all.
uint64_t place_rows(StreamPlan& plan, const KeptColumns& columns, int64_t groups, int tile_rows) {
  plan.starts.resize(groups * plan.chunks * (plan.blocks + 1));
  plan.orders.resize(groups * plan.chunks * plan.rows);
  std::vector<std::vector<Length>> lengths(groups * plan.chunks);
  each_unit(plan, groups, [&](int64_t group, int64_t row, int64_t count) {
    const int64_t first = group * plan.rows + row;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      uint8_t* order = plan.orders.data() + (group * plan.chunks + chunk) * plan.rows + row;
      tile_rows % 2 ? std::iota(order, order + count, 0) : columns.match(chunk, first, count, order);
      add_lengths(columns, order, chunk, first, count, tile_rows, lengths[group * plan.chunks + chunk]);
    }
  });
  uint64_t step = 0;
  Block* block = plan.starts.data();
  for (const std::vector<Length>& of_chunk : lengths) {
    step = place_blocks(of_chunk, block, step);
    block += plan.blocks + 1;
  }
  return step;
}

// Writes entries to where a plan that has its blocks wants them.
class StreamFiller {
 public:
  StreamFiller(StreamPlan& plan, const SparseRows& matrix, const float* values, const RowScales& scales,
               const std::vector<Layout::Place>& places, const KeptColumns& columns, int tile_rows, int64_t steps)
      : plan_(plan), matrix_(matrix), values_(values), scales_(scales), places_(places), columns_(columns), tile_rows_(tile_rows) {
    to_values_ = plan.values.unset(steps * stride());
    to_offsets_ = plan.offsets.unset(steps * stride());
    for (int64_t i = 0; i < columns.most(); ++i) places_in_block_.push_back(static_cast<uint32_t>(i / kStep * stride() + i % kStep));
  }

  // The rows of a unit in a chunk, together, so that their blocks stay in the cache.
  void fill(int64_t group, int64_t unit, int64_t count, int64_t chunk) {
    const int64_t first_row = group * plan_.rows + unit;
    const uint8_t* order = plan_.order(group, chunk, unit);
    const Block* blocks = plan_.start(group, chunk, unit / tile_rows_);
    const int64_t begin = blocks->first * stride(), end = blocks[ceil_div(count, tile_rows_)].first * stride();
    std::fill(to_values_ + begin, to_values_ + end, 0.0f);
    std::fill(to_offsets_ + begin, to_offsets_ + end, uint16_t{0});
    for (int64_t i = 0; i < count; ++i) {
      const Block& block = blocks[i / tile_rows_];
      const int64_t start = block.first * stride() + i % tile_rows_ * kStep;
      fill_row(chunk, first_row + order[i], first_row + partner(order, i, count), (block.apart - block.first) * kStep, start);
    }
  }

 private:
  int64_t stride() const { return int64_t{tile_rows_} * kStep; }  // from step to step

  // The entries of `row`, from `start` on: first those that it shares with the row `beside`, as many as `shared`.
  void fill_row(int64_t chunk, int64_t row, int64_t beside, uint32_t shared, int64_t start) {
    const uint64_t* kept_beside = columns_.bits(beside, chunk);
    const float scale = scales_.of(row);
    uint32_t last = 0, together = 0, apart = shared;  // the last entry; how many went where
    columns_.each_entry(chunk, row, [&](uint32_t entry, uint32_t column) {
      const Layout::Place& place = places_[column];
      const uint32_t joins = KeptColumns::keeps(kept_beside, place.number) & static_cast<uint32_t>(together < shared);
      const int64_t to = start + places_in_block_[joins ? together : apart];
      together += joins, apart += 1 - joins;
      to_values_[to] = values_[matrix_.value_index(entry)] * scale;
      to_offsets_[to] = place.offset;
      last = entry;
    });
    // Those of the next chunk follow; the rows between make them far apart.
    for (int64_t line = 0; line < kLinesAhead; ++line) __builtin_prefetch(values_ + last + 1 + line * 16);
  }

  StreamPlan& plan_;
  const SparseRows& matrix_;
  const float* values_;
  const RowScales& scales_;
  const std::vector<Layout::Place>& places_;
  const KeptColumns& columns_;
  const int tile_rows_;
  float* to_values_;
  uint16_t* to_offsets_;
  std::vector<uint32_t> places_in_block_;  // of a row's entries, from its first
};

}  // namespace

StreamPlan plan_stream(const SparseRows& matrix, const float* values, const RowScales& scales, int64_t groups, int tile_rows,
                       const Layout& layout) {
  StreamPlan plan;
  plan.rows = matrix.rows / groups;
  plan.chunks = layout.chunks();
  plan.blocks = ceil_div(plan.rows, tile_rows);
  const std::vector<Layout::Place> places = layout.places(matrix.order);
  const KeptColumns columns(matrix, places, plan.chunks);
  const int64_t steps = place_rows(plan, columns, groups, tile_rows);
  StreamFiller filler(plan, matrix, values, scales, places, columns, tile_rows, steps);
  each_unit(plan, groups, [&](int64_t group, int64_t unit, int64_t count) {
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) filler.fill(group, unit, count, chunk);
  });
  return plan;
}

namespace {

// The most entries that any row keeps in a column block of `size`, at most 64.
int64_t most_in_block(const SparseRows& matrix, int64_t size) {
  int most = 1;
  for (int64_t row = 0; row < matrix.rows; ++row)
    for (int64_t first = 0; first < matrix.columns; first += size)
      most = std::max(most, __builtin_popcountll(matrix.piece(row, first, std::min(size, matrix.columns - first))));
  return most;
}

// How the values are kept: those of 8 and 16 bits as they are, if the loops can widen them.
Storage storage_of(const Constant& values) {
  if (values.type == ort::kInt8) return Storage::kBytes;
  if (values.type != ort::kFloat16 && values.type != ort::kBfloat16) return Storage::kFloats;
  const uint16_t* bits = static_cast<const uint16_t*>(values.data);
  const uint16_t infinity = values.type == ort::kFloat16 ? 0x7c00 : 0x7f80;
  for (int64_t i = 0, count = values.size(); i < count; ++i)
    if ((bits[i] & infinity) == infinity) return Storage::kFloats;
  return values.type == ort::kFloat16 ? Storage::kHalves : Storage::kBrains;
}

}  // namespace

RowBlocks row_blocks(int64_t columns, int width, const std::function<int64_t(int)>& most) {
  RowBlocks best{};
  double least = 0;
  for (int size : {4, width, 16}) {
    const int64_t entries = most(size);  // a power of two below a word, else whole words
    RowBlocks blocks{size, entries > 4 ? ceil_div(entries, 8) * 8 : entries > 2 ? 4 : entries, 0};
    blocks.count = ceil_div(ceil_div(columns, size), blocks.per_word()) * blocks.per_word();
    const double cost = (size > width ? 1.5 : 1) * static_cast<double>(blocks.count * blocks.entries);  // two permutes and a blend
    if (least == 0 || cost < least) least = cost, best = blocks;
  }
  return best;
}

RowPlan plan_rows(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int width) {
  RowPlan plan;
  plan.storage = storage_of(values);
  const RowBlocks blocks = row_blocks(matrix.columns, width, [&](int size) { return most_in_block(matrix, size); });
  const int64_t size = blocks.columns, of_word = entries_of_word(blocks.columns), rows = matrix.rows / groups;
  plan.block = blocks.columns;
  plan.blocks_per_word = static_cast<int>(blocks.per_word());
  plan.words_per_block = std::max<int64_t>(1, blocks.entries / of_word);
  plan.padded_columns = blocks.count * size;
  plan.words = blocks.count * blocks.entries / of_word;
  plan.blocks = ceil_div(rows, width);

  const int64_t size_of_all = groups * plan.blocks * plan.entries() * width;
  uint32_t* positions = plan.positions.at_least(size_of_all / of_word);
  // Calls visit(block, first row, rows) for every row block.
  const auto each_block = [&](auto visit) {
    for (int64_t block = 0; block < groups * plan.blocks; ++block) {
      const int64_t within = block % plan.blocks * width;
      visit(block, block / plan.blocks * rows + within, std::min<int64_t>(width, rows - within));
    }
  };
  // What a row keeps in a column block, from place `next` of its lane on; returns the entry after it. Words are counted by shifts: a
  // division for each block took a fifth of all this.
  const int word_shift = __builtin_ctzll(of_word), bits = 32 >> word_shift;
  const auto place_block = [&](auto* out, auto value, int64_t row, int64_t lane, int64_t column, int64_t next, uint32_t entry) {
    uint32_t word = 0;
    for (uint64_t left = matrix.piece(row, column, std::min(size, matrix.columns - column)); left; left &= left - 1, ++entry) {
      out[next * width + lane] = value(row, matrix.value_index(entry));
      word |= static_cast<uint32_t>(__builtin_ctzll(left)) << (bits * (next & (of_word - 1)));
      if ((++next & (of_word - 1)) == 0) positions[((next >> word_shift) - 1) * width + lane] |= word, word = 0;
    }
    if (word) positions[(next >> word_shift) * width + lane] |= word;
    return entry;
  };
  const auto place_all = [&](auto* out, auto value) {
    std::vector<uint32_t> next_entries(width);
    each_block([&](int64_t block, int64_t first, int64_t count) {
      std::copy_n(matrix.starts.begin() + first, count, next_entries.begin());
      for (int64_t column = 0, start = block * plan.entries(); column < matrix.columns; column += size, start += blocks.entries)
        for (int64_t lane = 0; lane < count; ++lane)
          next_entries[lane] = place_block(out, value, first + lane, lane, column, start, next_entries[lane]);
    });
  };
  if (plan.storage == Storage::kFloats) {
    std::vector<float> widened;
    const float* floats = widen(values, widened);
    place_all(plan.floats.at_least(size_of_all), [&](int64_t row, uint32_t i) { return floats[i] * scales.of(row); });
    return plan;
  }
  if (plan.storage == Storage::kBytes) {
    place_all(plan.bytes.at_least(size_of_all), [&](int64_t, uint32_t i) { return static_cast<const int8_t*>(values.data)[i]; });
  } else {
    place_all(plan.shorts.at_least(size_of_all), [&](int64_t, uint32_t i) { return static_cast<const uint16_t*>(values.data)[i]; });
  }
  plan.scaled = scales.any();
  if (plan.scaled) {
    float* of_lanes = plan.scales.at_least(groups * plan.blocks * width);
    each_block([&](int64_t block, int64_t first, int64_t count) {
      for (int64_t lane = 0; lane < count; ++lane) of_lanes[block * width + lane] = scales.of(first + lane);
    });
  }
  return plan;
}

}  // namespace nmconvert
