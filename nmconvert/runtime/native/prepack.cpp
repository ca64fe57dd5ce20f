#include "prepack.h"

#include <algorithm>
#include <numeric>

#include "elements.h"
#include "ort_abi.h"
#include "pairing.h"

namespace nmconvert {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

}  // namespace

StreamPlan plan_stream(const SparseRows& matrix, const float* values, const RowScales& scales, int64_t groups, int tile_rows,
                       const Layout& layout) {
  StreamPlan plan;
  plan.rows = matrix.rows / groups;
  plan.chunks = layout.chunks();
  plan.blocks = ceil_div(plan.rows, tile_rows);
  const std::vector<Layout::Place> places = layout.places(matrix.order);
  const KeptColumns columns(matrix, places, plan.chunks);
  const uint64_t steps = place_rows(plan, columns, groups, tile_rows);

  float* out = plan.values.at_least(steps * tile_rows * kStep);
  uint16_t* offset = plan.offsets.at_least(steps * tile_rows * kStep);
  // Of a row in a chunk: its place in the unit, the row beside it, and the entries placed, all and shared.
  struct Row {
    uint8_t position, partner;
    uint32_t placed, shared;
  };
  std::vector<Row> rows(kRowUnit * plan.chunks);
  each_unit(plan, groups, [&](int64_t group, int64_t unit, int64_t count) {
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const uint8_t* order = plan.order(group, chunk, unit);
      for (int64_t i = 0; i < count; ++i)
        rows[order[i] * plan.chunks + chunk] = {static_cast<uint8_t>(i), partner(order, i, count), 0, 0};
    }
    const int64_t first_row = group * plan.rows + unit;
    for (int64_t in_unit = 0; in_unit < count; ++in_unit) {
      const float scale = scales.of(first_row + in_unit);
      each_run(matrix, places, first_row + in_unit, [&](uint32_t chunk, uint32_t first, uint32_t last) {
        Row& row = rows[in_unit * plan.chunks + chunk];
        const Block block = *plan.start(group, chunk, (unit + row.position) / tile_rows);
        const int64_t start = (static_cast<int64_t>(block.first) * tile_rows + row.position % tile_rows) * kStep;
        const uint32_t shared = (block.apart - block.first) * kStep;
        const uint64_t* beside = columns.bits(first_row + row.partner, chunk);
        Row now = row;
        for (uint32_t entry = first; entry < last; ++entry, ++now.placed) {
          const Layout::Place place = places[matrix.column[entry]];
          const uint32_t together = KeptColumns::at(beside, place.number) & static_cast<uint32_t>(now.shared < shared);
          const uint32_t apart = shared + now.placed - now.shared, i = together ? now.shared : apart;
          now.shared += together;
          const int64_t to = start + i / kStep * (tile_rows * kStep) + i % kStep;
          out[to] = values[matrix.value_index(entry)] * scale;
          offset[to] = place.offset;
        }
        row = now;
      });
    }
  });
  return plan;
}

namespace {

// The most entries that any row keeps in a column block of `size`.
int64_t most_in_block(const SparseRows& matrix, int64_t size) {
  int64_t most = 1;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    int64_t count = 0;
    uint32_t block = UINT32_MAX;
    for (uint32_t i = matrix.starts[row]; i < matrix.starts[row + 1]; ++i) {
      const uint32_t here = matrix.column[i] / static_cast<uint32_t>(size);
      count = here == block ? count + 1 : 1;
      block = here;
      most = std::max(most, count);
    }
  }
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

// A power of two below a word, else whole words.
int64_t padded_entries(int64_t entries) {
  if (entries > 4) return ceil_div(entries, 8) * 8;
  return entries > 2 ? 4 : entries;
}

RowPlan plan_rows(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int width) {
  RowPlan plan;
  plan.storage = storage_of(values);
  const int64_t narrow = padded_entries(most_in_block(matrix, width));
  int64_t entries = narrow, size = width;
  if (width < 16) {
    const int64_t wide = padded_entries(most_in_block(matrix, 16));
    plan.wide = 3 * wide * width <= 2 * narrow * 16;  // two permutes and a blend cost half as much again
    if (plan.wide) entries = wide, size = 16;
  }
  const int64_t rows = matrix.rows / groups;
  int64_t column_blocks = ceil_div(matrix.columns, size);
  plan.blocks_per_word = entries < 8 ? static_cast<int>(8 / entries) : 1;
  plan.words_per_block = entries < 8 ? 1 : entries / 8;
  column_blocks = ceil_div(column_blocks, plan.blocks_per_word) * plan.blocks_per_word;
  plan.padded_columns = column_blocks * size;
  plan.words = column_blocks * entries / 8;
  plan.blocks = ceil_div(rows, width);

  const int64_t size_of_all = groups * plan.blocks * plan.words * 8 * width;
  uint32_t* positions = plan.positions.at_least(size_of_all / 8);
  const auto block_of = [&](int64_t row) { return row / rows * plan.blocks + row % rows / width; };
  const auto place_all = [&](auto* out, auto value) {
    for (int64_t row = 0; row < matrix.rows; ++row) {
      const int64_t block = block_of(row), lane = row % rows % width;
      int64_t next = 0, current = -1;
      for (uint32_t i = matrix.starts[row]; i < matrix.starts[row + 1]; ++i) {
        const int64_t here = matrix.column[i] / size;
        next = here == current ? next + 1 : here * entries;
        current = here;
        const int64_t word = block * plan.words + next / 8;
        out[(word * 8 + next % 8) * width + lane] = value(row, matrix.value_index(i));
        positions[word * width + lane] |= static_cast<uint32_t>(matrix.column[i] % size) << (4 * (next % 8));
      }
    }
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
    for (int64_t row = 0; row < matrix.rows; ++row) of_lanes[block_of(row) * width + row % rows % width] = scales.of(row);
  }
  return plan;
}

}  // namespace nmconvert
