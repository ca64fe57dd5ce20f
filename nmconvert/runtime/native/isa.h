// What the inner loops offer, one table for each instruction set; see kernels.inl, which is compiled once for each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nmconvert {

struct Amx;

enum class Activation { kNone, kClip, kSilu, kGelu, kGeluTanh };
constexpr bool activates(Activation activation) { return activation > Activation::kClip; }  // beyond clipping

constexpr int kStep = 4;  // kept entries that are read at once: four values, and four 16-bit offsets in one word

constexpr int kRowUnit = 16;  // rows that work is split into multiples of; a multiple of every tile's

// Rows of a tile that advance in lockstep. Of each pair of rows (the first and second, third and fourth …) the steps before
// `apart` read the same places of the panel, which are loaded once; up to the next block's first step each reads its own.
struct Block {
  uint32_t first, apart;  // steps
};

// Lines from which the next chunk will be filled, fetched while this one is multiplied.
struct Ahead {
  const float* from;
  const int64_t* offsets;  // [lines]
  int64_t lines;           // 0 where they are at hand
};

// One chunk of one panel: out[r] = clip(in[r] + bias[r] + sum over kept entries of value * panel[offset]).
struct StreamJob {
  const float* values;      // [step][tile row][kStep]
  const uint16_t* offsets;  // the same order: vectors from the start of the panel
  const Block* blocks;      // [blocks + 1], of tile rows
  const uint8_t* order;     // [rows]: which row of its unit each is that the blocks hold
  int64_t rows;             // output rows; the last block may be short
  const float* panel;
  const float* in;  // what is added to: [rows][in_stride], or null for zeros
  int64_t in_stride;
  const float* bias;  // [rows], or null
  float* out;         // [rows][out_stride], whole tiles wide
  int64_t out_stride;
  float low, high;
  Ahead ahead;
};

// How the values of RowJob stand in memory. One token through a large layer is limited by the bytes that it reads.
enum class Storage { kFloats, kHalves, kBrains, kBytes };

// A tile holds `vectors` accumulators for each of `rows` output rows that advance in lockstep.
struct Tile {
  int vectors;
  int rows;
  void (*stream)(const StreamJob&);
};
constexpr int kTileCount = 6;

// Entries whose positions in their column block share 32 bits: two bits for each where a block has four columns, else four.
constexpr int entries_of_word(int block) { return block == 4 ? 16 : 8; }

// Few tokens: lanes are output rows.
struct RowJob {
  const void* values;         // [row block][word][its entries][width]
  Storage storage;
  const float* scales;        // [row block][width]: what the sums are multiplied by, or null
  const uint32_t* positions;  // [row block][word][width]
  int64_t words;              // words of a row block
  int64_t first_block, last_block;
  int64_t rows;
  int block;            // columns of a column block: 4, the width, or 16
  int blocks_per_word;  // 1, 2, 4, 8, 16: column blocks that one word serves
  int64_t words_per_block;  // where one block needs several words
  const float* x;       // [tokens][x_stride], zero-padded to whole column blocks
  int64_t x_stride;
  int tokens;           // 1 to 4
  const float* bias;    // [rows], or null
  const float* residual;  // [tokens][out_stride], or null
  float* out;             // [tokens][out_stride]
  int64_t out_stride;
  float low, high;
};

// A run of floats that stand together where they are read and where they are written.
struct Segment {
  int64_t from, to, count;
};

// What of a line of a strip lies in the image: the others are pads, which are zeros.
struct Inside {
  int32_t left, right;  // lanes from left to right - 1
  int32_t first, last;  // vectors from first to last - 1
};

// Lines of `height` vectors, each of `count` equal parts, from `pieces`; lane i of vector v of a line reads i · stride + v · step
// further on.
struct StripJob {
  const float* from;
  const int64_t* offsets;  // [lines]
  int64_t lines;
  const Segment* pieces;
  int64_t count;
  int64_t height;
  int64_t stride;  // 1 or 2
  int64_t step;
  const Inside* inside;  // [period][count]
  int64_t period;        // lines, after which it is the same
  float* panel;
};

// Sums on their way out: row r of y [rows][y_stride], segment by segment, is activation(clip(sums + residual)).
struct FinishJob {
  const float* sums;  // [rows][sums_stride]
  int64_t sums_stride;
  int64_t rows;
  const Segment* segments;
  int64_t count;
  const float* residual;  // strides of y, or null
  float* y;
  int64_t y_stride;
  bool afar;  // whether y lies beyond the caches
  float low, high;
  Activation activation;
};

struct Isa {
  const char* name;
  int width;      // floats in a vector
  Tile tiles[kTileCount];
  void (*rows)(const RowJob&);
  // x [tokens][x_stride] → panel [columns][panel_width], zero where there is no token.
  void (*pack_tokens)(const float* x, int64_t x_stride, int64_t tokens, int64_t columns, float* panel, int64_t panel_width);
  // panel [rows][panel_width] → y [tokens][y_stride] = clip(panel + residual).
  void (*unpack_tokens)(const float* panel, int64_t panel_width, int64_t rows, int64_t tokens, const float* residual, float* y,
                        int64_t y_stride, float low, float high);
  void (*activate)(float* y, int64_t count, Activation activation);
  // Rows of `columns` floats to rows `pitch` apart, behind `before` zeros, and before as many as fill the pitch.
  void (*pad)(const float* from, int64_t rows, int64_t columns, int64_t before, int64_t pitch, float* to);
  // to[i] = from[i · stride], for i in 0 … count - 1.
  void (*every)(const float* from, int64_t stride, int64_t count, float* to);
  // Row c of the panel is filled from the runs `segments`, starting at from + offsets[c]. Up to a vector is read and written
  // beyond each run: runs are in rising order, so that the next one overwrites it.
  void (*gather)(const float* from, const int64_t* offsets, int64_t columns, const Segment* segments, int64_t count, float* panel,
                 int64_t panel_width);
  void (*gather_strips)(const StripJob& job);
  // A row of pixels from `from`, of which `size` floats may be read: to[pixel][column] = from[offsets[column] + pixel].
  void (*turn_pixels)(const float* from, int64_t size, const int64_t* offsets, int64_t columns, int64_t pixels, float* to);
  void (*finish)(const FinishJob& job);
  // For float, half, bfloat16 and double: weights [rows][columns], pruned in place to the n largest of every m; energy[0] and
  // [1] are the sums of squares before and after. False where one of them is NaN or infinite.
  bool (*prune[4])(void* weights, int64_t rows, int64_t columns, int n, int m, double* energy);
  // Training under masks of one byte an entry, for float and double; see masking.inl.
  int64_t (*renew_mask[2])(const void* weights, uint8_t* mask, int64_t groups, int64_t spacing, int n, int m);
  void (*masked[2])(const void* weights, const uint8_t* mask, int64_t count, void* out);
  void (*add_pruned[2])(const void* weights, const uint8_t* mask, int64_t count, double factor, void* sum);
  const Amx* amx;    // a matrix unit beside the vectors, or null
  bool always_amx;   // it takes all that it can, for tests, not only what it is estimated to be faster at
};

const Isa* isa_portable();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_neon();
const Isa* isa_amx(bool always);  // AVX-512 and the matrix unit; null where there is none

// The best table for this CPU, or the one that NMCONVERT_ISA names; null where there is none.
const Isa* select_isa();
// A table with narrower vectors than `isa`, for shapes that would leave lanes idle; null where there is none.
const Isa* narrower(const Isa* isa);

}  // namespace nmconvert
