// Kept entries in the order in which the inner loops read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "isa.h"
#include "layout.h"
#include "matrix.h"
#include "memory.h"

namespace nmconvert {

// For Tile::stream. Rows come in blocks of the tile's rows, columns in chunks whose panel stays in the L1 cache. In each chunk the
// rows of a unit have an order of their own. Steps are filled up by entries of zero times the chunk's first column: where an input there
// is infinite or NaN, rows that do not keep that column become NaN, as they do when the dense weight has a zero there.
struct StreamPlan {
  int64_t rows = 0;    // of one group
  int64_t chunks = 0;
  int64_t blocks = 0;  // row blocks of a group
  std::vector<Block> starts;    // [groups][chunks][blocks + 1]
  std::vector<uint8_t> orders;  // [groups][chunks][rows]
  Buffer<float> values;
  Buffer<uint16_t> offsets;

  const Block* start(int64_t group, int64_t at_chunk, int64_t block) const {
    return starts.data() + (group * chunks + at_chunk) * (blocks + 1) + block;
  }
  const uint8_t* order(int64_t group, int64_t at_chunk, int64_t row) const {
    return orders.data() + (group * chunks + at_chunk) * rows + row;
  }
};

// For Isa::rows. Groups follow one another; each starts at a row block of its own.
struct RowPlan {
  int64_t blocks = 0;  // of one group
  int64_t words = 0;
  int64_t words_per_block = 1;
  int blocks_per_word = 1;
  int block = 4;  // columns of a column block
  int64_t padded_columns = 0;
  Storage storage = Storage::kFloats;
  Buffer<float> floats;
  Buffer<uint16_t> shorts;  // where the file stores 16 bits
  Buffer<int8_t> bytes;     // or 8
  bool scaled = false;      // what is not stored in floats may be
  Buffer<float> scales;     // [row block][width]
  Buffer<uint32_t> positions;

  // Of a lane.
  int64_t entries() const { return words * entries_of_word(block); }
  // The values from `index` on.
  const void* values(int64_t index) const {
    if (storage == Storage::kFloats) return floats.data() + index;
    return storage == Storage::kBytes ? static_cast<const void*>(bytes.data() + index) : shorts.data() + index;
  }
};

StreamPlan plan_stream(const SparseRows& matrix, const float* values, const RowScales& scales, int64_t groups, int tile_rows,
                       const Layout& layout);
// The column blocks of a row plan: how many columns and entries each has, and how many there are.
struct RowBlocks {
  int columns;
  int64_t entries, count;
  int64_t per_word() const { return std::max<int64_t>(1, entries_of_word(columns) / entries); }
};
// Those of 4, `width` or 16 columns that take the least, where a row keeps at most most(size) of so many.
RowBlocks row_blocks(int64_t columns, int width, const std::function<int64_t(int)>& most);
RowPlan plan_rows(const SparseRows& matrix, const Constant& values, const RowScales& scales, int64_t groups, int width);

}  // namespace nmconvert
