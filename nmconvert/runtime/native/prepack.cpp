#include "prepack.h"

#include <algorithm>
#include <array>

#include "elements.h"
#include "ort_abi.h"

namespace nmconvert {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kept entries of a row in a chunk, and how many of them the row's partner in its block keeps, too: all where it has none.
struct Count {
  uint32_t kept = 0, shared = 0;
};

// Rows in pairs, and which columns the two of one keep.
class Pairs {
 public:
  Pairs(const SparseRows& matrix, const std::vector<Layout::Place>& places, int64_t rows)
      : matrix_(matrix), places_(places), rows_(rows), keeps_{Marks(matrix.columns), Marks(matrix.columns)} {}

  // Calls visit(chunk, first, last, shares) for every run of entries of `row` in one chunk; shares(column) says whether the
  // partner keeps a column, too. To be called for rows in rising order.
  template <typename Visit>
  void runs(int64_t row, Visit visit) {
    const int64_t in_group = row % rows_, odd = in_group % 2, both = in_group + 1 < rows_ ? 2 : 1;
    for (int64_t i = 0; odd == 0 && i < both; ++i)
      for (uint32_t entry = matrix_.starts[row + i]; entry < matrix_.starts[row + i + 1]; ++entry)
        keeps_[i][matrix_.column[entry]] = static_cast<uint32_t>(row + 1);
    const uint32_t id = static_cast<uint32_t>(row - odd + 1), *partner = keeps_[odd ? 0 : both - 1].data();
    const auto shares = [=](uint32_t column) { return static_cast<uint32_t>(partner[column] == id); };
    for (uint32_t first = matrix_.starts[row], last = first, end = matrix_.starts[row + 1]; first < end; first = last) {
      const uint32_t chunk = places_[matrix_.column[first]].chunk;
      while (last < end && places_[matrix_.column[last]].chunk == chunk) ++last;
      visit(chunk, first, last, shares);
    }
  }

 private:
  using Marks = std::vector<uint32_t>;

  const SparseRows& matrix_;
  const std::vector<Layout::Place>& places_;
  int64_t rows_;  // of a group
  std::array<Marks, 2> keeps_;
};

// Of every row in every chunk.
std::vector<Count> count_entries(const SparseRows& matrix, Pairs& pairs, int64_t chunks) {
  std::vector<Count> counts(matrix.rows * chunks);
  for (int64_t row = 0; row < matrix.rows; ++row)
    pairs.runs(row, [&](uint32_t chunk, uint32_t first, uint32_t last, auto shares) {
      Count& count = counts[row * chunks + chunk];
      count.kept += last - first;
      for (uint32_t entry = first; entry < last; ++entry) count.shared += shares(matrix.column[entry]);
    });
  return counts;
}

// Steps that all but an eighth of the blocks from `first` on can share: a loop that always runs as often is foreseen.
void even_out(Block* first, int64_t blocks) {
  std::vector<uint32_t> shared(blocks);
  for (int64_t i = 0; i < blocks; ++i) shared[i] = first[i].apart - first[i].first;
  std::nth_element(shared.begin(), shared.begin() + blocks / 8, shared.end());
  for (int64_t i = 0; i < blocks; ++i) first[i].apart = std::min(first[i].apart, first[i].first + shared[blocks / 8]);
}

// Fills plan.starts, a block being as long as the longest of its rows; returns the steps in all.
uint64_t place_blocks(StreamPlan& plan, const std::vector<Count>& counts, int64_t groups, int tile_rows) {
  uint64_t step = 0;
  auto start = plan.starts.begin();
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      for (int64_t block = 0; block < plan.blocks; ++block) {
        Count of_block{0, tile_rows % 2 ? 0 : UINT32_MAX};
        for (int64_t row = block * tile_rows; row < std::min(plan.rows, (block + 1) * tile_rows); ++row) {
          const Count& count = counts[(group * plan.rows + row) * plan.chunks + chunk];
          of_block = {std::max(of_block.kept, count.kept), std::min(of_block.shared, count.shared)};
        }
        *start++ = {static_cast<uint32_t>(step), static_cast<uint32_t>(step + of_block.shared / kStep)};
        step += ceil_div(of_block.kept, kStep);
      }
      *start++ = {static_cast<uint32_t>(step), static_cast<uint32_t>(step)};
      even_out(&*(start - plan.blocks - 1), plan.blocks);
    }
  if (step > UINT32_MAX) throw InvalidNode("the weight is too large");
  return step;
}

}  // namespace

StreamPlan plan_stream(const SparseRows& matrix, const float* values, const RowScales& scales, int64_t groups, int tile_rows,
                       const Layout& layout) {
  StreamPlan plan;
  plan.rows = matrix.rows / groups;
  plan.chunks = layout.chunks();
  plan.blocks = ceil_div(plan.rows, tile_rows);
  plan.starts.resize(groups * plan.chunks * (plan.blocks + 1));
  const std::vector<Layout::Place> places = layout.places(matrix.order);
  Pairs pairs(matrix, places, plan.rows);
  const uint64_t steps = place_blocks(plan, count_entries(matrix, pairs, plan.chunks), groups, tile_rows);

  float* out = plan.values.at_least(steps * tile_rows * kStep);
  uint16_t* offset = plan.offsets.at_least(steps * tile_rows * kStep);
  std::vector<Count> placed(plan.chunks);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const int64_t group = row / plan.rows, in_group = row % plan.rows;
    const float scale = scales.of(row);
    std::fill(placed.begin(), placed.end(), Count{});
    pairs.runs(row, [&](uint32_t chunk, uint32_t first, uint32_t last, auto shares) {
      const Block block = *plan.start(group, chunk, in_group / tile_rows);
      const int64_t start = (static_cast<int64_t>(block.first) * tile_rows + in_group % tile_rows) * kStep;
      const uint32_t shared = (block.apart - block.first) * kStep;
      Count count = placed[chunk];
      for (uint32_t entry = first; entry < last; ++entry, ++count.kept) {
        const uint32_t together = shares(matrix.column[entry]) & static_cast<uint32_t>(count.shared < shared);
        const uint32_t apart = shared + count.kept - count.shared, i = together ? count.shared : apart;
        count.shared += together;
        const int64_t to = start + i / kStep * (tile_rows * kStep) + i % kStep;
        out[to] = values[matrix.value_index(entry)] * scale;
        offset[to] = places[matrix.column[entry]].offset;
      }
      placed[chunk] = count;
    });
  }
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
