// The inner loops, written once over the vector width and compiled once for each instruction set.
//
// The including file defines NMC_NAMESPACE, NMC_WIDTH, NMC_NAME, NMC_REGISTERS and NMC_FACTORY. Nothing of the standard
// library may be used here: an inline function compiled for AVX-512 could be the copy that the linker keeps for every CPU.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace nmconvert {
namespace NMC_NAMESPACE {

constexpr int W = NMC_WIDTH;
typedef float Vector __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint64_t Word __attribute__((aligned(2), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vector splat(float x) {
#if NMC_WIDTH == 16
  return _mm512_set1_ps(x);
#elif NMC_WIDTH == 8
  return _mm256_set1_ps(x);
#else
  return Vector{x, x, x, x};
#endif
}

// Four floats, repeated through the vector; and one of the four in every lane. A load for each value would cost a load slot,
// which the panel needs.
inline Vector four(const float* p) {
#if NMC_WIDTH == 16
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif NMC_WIDTH == 8
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  return load(p);
#endif
}
template <int I>
inline Vector one_of(Vector four) {
#if NMC_WIDTH == 16
  return _mm512_permute_ps(four, 0x55 * I);
#elif NMC_WIDTH == 8
  return _mm256_permute_ps(four, 0x55 * I);
#else
  return __builtin_shuffle(four, Ints{I, I, I, I});
#endif
}

// Loads `v` once, where GCC would read it from memory for each use.
inline void keep_in_register([[maybe_unused]] Vector& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// What is read after this is not read before it: where registers are few, GCC otherwise mixes the entries of a step, or takes out of a
// loop what then has no register in it.
inline void in_order() { asm volatile("" ::: "memory"); }

// What is prefetched before this is not prefetched together with what follows, as GCC has it: of many at once some wait, and all that
// comes after them.
inline void apart() { asm volatile(""); }

// NaN in `v` survives both, as in the standard operators.
inline Vector clip(Vector v, Vector low, Vector high) {
#if NMC_WIDTH == 16
  return _mm512_min_ps(high, _mm512_max_ps(low, v));
#elif NMC_WIDTH == 8
  return _mm256_min_ps(high, _mm256_max_ps(low, v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Streaming: a kept entry is a value and the offset of its row in the panel, whatever N, M and the axis are.

// Where the I-th of four offsets points.
template <int I>
inline const float* place(const char* panel, uint64_t offsets) {
  constexpr int kShift = W == 16 ? 6 : W == 8 ? 5 : 4;  // of a vector's bytes
  static_assert(sizeof(Vector) == 1 << kShift, "offsets count vectors");
  const uint64_t shifted = 16 * I >= kShift ? offsets >> (16 * I - kShift) : offsets << (kShift - 16 * I);
  return reinterpret_cast<const float*>(panel + (shifted & uint64_t{0xffff} << kShift));
}

// The I-th of four values in every lane. Where two rows share what they read, products are the bound and loads are not, and on Intel's
// servers a permutation takes the place of a product: the value is loaded once more.
template <int I, int Reads>
inline Vector value_of(const float* values, Vector four) {
  return W == 16 && Reads > 1 ? splat(values[I]) : one_of<I>(four);
}

// sum += value · panel row, for the I-th of four kept entries of R rows, read once for `Reads` of them.
template <int I, int Reads, int N, int R>
inline void accumulate(Vector (*sum)[N], const char* panel, const float* values, const Vector (&quads)[R], const uint64_t (&offsets)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r += Reads) {
    const float* source = place<I>(panel, offsets[r]);
    Vector value[Reads];
#pragma GCC unroll 2
    for (int i = 0; i < Reads; ++i) value[i] = value_of<I, Reads>(values + (r + i) * kStep, quads[r + i]);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Vector x = load(source + n * W);
      if (Reads > 1) keep_in_register(x);
#pragma GCC unroll 2
      for (int i = 0; i < Reads; ++i) sum[r + i][n] += value[i] * x;
    }
  }
}

// One step of R rows. Rows inside entries, so that a sum is not needed again at once, where the registers suffice.
template <int Reads, int N, int R>
inline void step(Vector (&sum)[R][N], const char* panel, const float* values, const uint16_t* offsets) {
  constexpr int kTogether = (N + 1) * R + 4 <= NMC_REGISTERS ? R : Reads;
  constexpr bool kTight = Reads > 1 && NMC_REGISTERS <= 16;
#pragma GCC unroll 8
  for (int first = 0; first < R; first += kTogether) {
    const float* const of_rows = values + first * kStep;
    Vector quads[kTogether];
    uint64_t words[kTogether];
#pragma GCC unroll 8
    for (int r = 0; r < kTogether; ++r) {
      quads[r] = four(of_rows + r * kStep);
      words[r] = *reinterpret_cast<const Word*>(offsets + (first + r) * kStep);
    }
    accumulate<0, Reads>(sum + first, panel, of_rows, quads, words);
    if (kTight) in_order();
    accumulate<1, Reads>(sum + first, panel, of_rows, quads, words);
    if (kTight) in_order();
    accumulate<2, Reads>(sum + first, panel, of_rows, quads, words);
    if (kTight) in_order();
    accumulate<3, Reads>(sum + first, panel, of_rows, quads, words);
  }
}

// Weights come from beyond the L2 cache, once for every panel, and faster than the processor foresees. Into all caches: what is
// prefetched past the second (NTA) falls out of the third as well on Intel's servers, and comes from memory every time.
constexpr int kAheadOfStep = 256;  // entries
inline void prefetch_entries(const float* values, const uint16_t* offsets, int64_t count) {
  constexpr int kInLine = 16;  // values
  for (int64_t i = 0; i < count; i += kInLine) __builtin_prefetch(values + kAheadOfStep + i);
  for (int64_t i = 0; i < count; i += 2 * kInLine) __builtin_prefetch(offsets + kAheadOfStep + i);
}

// A step of one row is a fraction of a line: what a row of them takes is prefetched before it, because the same lines at every
// step make the loop take a quarter longer on Zen 3.
template <int Reads, int N, int R>
inline void steps(Vector (&sum)[R][N], const char* panel, const float*& values, const uint16_t*& offsets, uint32_t count) {
  if (R == 1) prefetch_entries(values, offsets, count * kStep);
  for (; count > 0; --count, values += R * kStep, offsets += R * kStep) {
    if (R > 1) prefetch_entries(values, offsets, R * kStep);
    step<Reads>(sum, panel, values, offsets);
  }
}

// Blocks of rows from now until what is added to them is needed. Images of a batch come from memory: one block is too late.
constexpr int kBlocksAhead = 4;

// Rows of an image, which lie too far apart for the processor to foresee, to be read or written.
template <int N, int R, int Write>
inline void prefetch_rows(const float* rows, int64_t stride, const int64_t (&at)[R]) {
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) __builtin_prefetch(rows + at[r] * stride + n * W, Write);
}

// The rows of the block that starts at `row`; the last for those that there are not.
template <int R>
inline void find_rows(const StreamJob& job, int64_t row, int64_t (&at)[R]) {
  for (int r = 0; r < R; ++r) {
    const int64_t here = row + r < job.rows ? row + r : job.rows - 1;
    at[r] = here / kRowUnit * kRowUnit + job.order[here];
  }
}

// Always inline: GCC leaves out calls of a function that does nothing but prefetch.
template <int N>
__attribute__((always_inline)) inline void prefetch_lines(const Ahead& ahead, int64_t first, int64_t last) {
  for (int64_t line = first; line < (last < ahead.lines ? last : ahead.lines); ++line)
    for (int n = 0; n < N; ++n) __builtin_prefetch(ahead.from + ahead.offsets[line] + n * W);
}

template <int N, int R>
void stream(const StreamJob& job) {
  static_assert(kRowUnit % R == 0, "a block lies in one unit");
  const bool clips = job.low > -__builtin_inff() || job.high < __builtin_inff();
  const bool writes_afar = job.out_stride > N * W, reads_afar = job.in && job.in_stride > N * W;
  const char* const panel = reinterpret_cast<const char*>(job.panel);
  const float* values = job.values + static_cast<int64_t>(job.blocks[0].first) * R * kStep;
  const uint16_t* offsets = job.offsets + static_cast<int64_t>(job.blocks[0].first) * R * kStep;
  const Block* block = job.blocks;
  const int64_t lines = (job.ahead.lines * R + job.rows - 1) / job.rows;  // for each block
  for (int64_t row = 0; row < job.rows; row += R, ++block) {
    if (lines > 0) prefetch_lines<N>(job.ahead, row / R * lines, (row / R + 1) * lines);
    const int valid = job.rows - row < R ? static_cast<int>(job.rows - row) : R;
    int64_t at[R];
    Vector sum[R][N];
    if (writes_afar) {
      find_rows(job, row + R, at);
      prefetch_rows<N, R, 1>(job.out, job.out_stride, at);
    }
    if (reads_afar) {
      find_rows(job, row + kBlocksAhead * R, at);
      prefetch_rows<N, R, 0>(job.in, job.in_stride, at);
    }
    find_rows(job, row, at);
    for (int r = 0; r < R; ++r) {
      const Vector bias = splat(job.bias ? job.bias[at[r]] : 0.0f);
      const float* in = job.in + at[r] * job.in_stride;
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[r][n] = job.in ? load(in + n * W) + bias : bias;
    }
    if constexpr (R % 2 == 0) steps<2>(sum, panel, values, offsets, block->apart - block->first);
    steps<1>(sum, panel, values, offsets, block[1].first - block->apart);
    for (int r = 0; r < R; ++r) {
      if (r >= valid) break;
      float* out = job.out + at[r] * job.out_stride;
      if (clips) {
        in_order();
        const Vector low = splat(job.low), high = splat(job.high);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[r][n] = clip(sum[r][n], low, high);
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(out + n * W, sum[r][n]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Row permute: lanes are W output rows; a block of columns of x stands in a register, and a permute selects by position.

inline Vector permute(Vector x, Ints position) {
#if NMC_WIDTH == 16
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(position), x);
#elif NMC_WIDTH == 8
  return _mm256_permutevar8x32_ps(x, reinterpret_cast<__m256i>(position));
#else
  return __builtin_shuffle(x, position);
#endif
}

// A block of 4, W or 16 columns of x, in registers; or where Shared W of them, which are several blocks: on Zen 4 repeating four floats
// through 16 lanes takes slots that products need, while a token alone waits for the weights.
template <int Block, bool Shared>
struct Columns {
  static constexpr int kBlocks = Shared ? W / Block : 1;  // that share them
  static constexpr int kParts = Block > W ? Block / W : 1;
  Vector part[kParts];

  // Of the block `number` from x on.
  static Columns from(const float* x, int number) {
    Columns columns;
    if (kBlocks > 1) return {{load(x + number / kBlocks * W)}};
    if (Block == 4) return {{four(x + number * 4)}};
    for (int i = 0; i < kParts; ++i) columns.part[i] = load(x + number * Block + i * W);
    return columns;
  }
  // Where `position`, modulo the block, is among these columns.
  static Ints within(Ints position, int number) {
    return kBlocks > 1 ? (position & (Block - 1)) | number % kBlocks * Block : position;
  }
  Vector at(Ints position) const {
#if NMC_WIDTH == 16
    if (Block == 4 && !Shared) return _mm512_permutevar_ps(part[0], reinterpret_cast<__m512i>(position));
#elif NMC_WIDTH == 8
    if (Block == 4) return _mm256_permutevar_ps(part[0], reinterpret_cast<__m256i>(position));
#endif
    if (kParts == 1) return permute(part[0], position);
#if NMC_WIDTH == 8
    const Vector below = permute(part[0], position), above = permute(part[kParts - 1], position);
    return _mm256_blendv_ps(below, above, reinterpret_cast<__m256>(position << 28));  // bit 3 is the sign
#else
    Vector chosen = {};
    for (int i = 0; i < kParts; ++i) chosen = ((position & 15) / W) == i ? permute(part[i], position) : chosen;
    return chosen;
#endif
  }
};

// W values as floats; those of 16 bits are finite. A half's bits, moved into place, are its value over 2^112.
typedef int16_t Shorts __attribute__((vector_size(2 * W), aligned(2), may_alias));

inline Ints extended(const int16_t* p) { return __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Ints); }

// W bytes as floats. GCC converts vectors of bytes one by one.
inline Vector signed_bytes(const int8_t* p) {
#if NMC_WIDTH == 16
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(*reinterpret_cast<const __m128i_u*>(p)));
#elif NMC_WIDTH == 8
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#else
  int32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return __builtin_convertvector((Ints{bytes, bytes, bytes, bytes} << Ints{24, 16, 8, 0}) >> 24, Vector);
#endif
}

template <Storage Stored>
inline Vector stored_values(const void* values, int64_t index) {
  const int16_t* shorts = static_cast<const int16_t*>(values) + index;
  if (Stored == Storage::kFloats) return load(static_cast<const float*>(values) + index);
  if (Stored == Storage::kBytes) return signed_bytes(static_cast<const int8_t*>(values) + index);
  if (Stored == Storage::kBrains) return reinterpret_cast<Vector>(extended(shorts) << 16);
#if NMC_WIDTH == 16
  return _mm512_cvtph_ps(*reinterpret_cast<const __m256i_u*>(shorts));
#else
  return reinterpret_cast<Vector>((extended(shorts) << 13) & static_cast<int32_t>(0x8fffe000)) * 0x1p112f;
#endif
}

constexpr int bytes_of(Storage stored) { return stored == Storage::kFloats ? 4 : stored == Storage::kBytes ? 1 : 2; }

// Entries of a lane that are prefetched ahead. On Zen 3 further ahead is slower than nothing, but where two permutations take their time.
constexpr int ahead_in_lane(int block) { return W == 8 && block <= W ? 32 : 48; }

template <int Tokens, int BlocksPerWord, int Block, Storage Stored>
void row_blocks(const RowJob& job) {
  constexpr int kSums = Tokens == 1 ? 8 : Tokens == 2 ? 4 : 2, kEntries = entries_of_word(Block);
  constexpr int kAhead = ahead_in_lane(Block), kBytes = bytes_of(Stored) * W;
  using Held = Columns<Block, W == 16 && Block == 4 && (Tokens > 1)>;
  for (int64_t block = job.first_block; block < job.last_block; ++block) {
    int64_t values = block * job.words * kEntries * W;
    const uint32_t* positions = job.positions + block * job.words * W;
    Vector sum[Tokens][kSums] = {};
    const float* x = job.x;
    int64_t left_in_block = job.words_per_block;
    for (int64_t word = 0; word < job.words; ++word) {
      Ints position = *reinterpret_cast<const LooseInts*>(positions);
      Held columns[Tokens];
      __builtin_prefetch(positions + kAhead / kEntries * W);
#pragma GCC unroll 16
      for (int i = 0; i < kEntries; ++i) {
        if (i * kBytes % 64 == 0) __builtin_prefetch(static_cast<const char*>(job.values) + (values / W + i + kAhead) * kBytes);
        const Vector value = stored_values<Stored>(job.values, values + i * W);
        const int number = i * BlocksPerWord / kEntries;
        const Ints place = Held::within(position, number);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          if (i * BlocksPerWord % (kEntries * Held::kBlocks) == 0) columns[t] = Held::from(x + t * job.x_stride, number);
          sum[t][i % kSums] += value * columns[t].at(place);
        }
        position = position >> 32 / kEntries;
        apart();
      }
      values += kEntries * W;
      positions += W;
      if (BlocksPerWord > 1 || --left_in_block == 0) {
        x += BlocksPerWord * Block;
        left_in_block = job.words_per_block;
      }
    }
    const int64_t row = block * W;
    const int valid = job.rows - row < W ? static_cast<int>(job.rows - row) : W;
    for (int t = 0; t < Tokens; ++t) {
      Vector total = sum[t][0];
      for (int i = 1; i < kSums; ++i) total += sum[t][i];
      if (job.scales) total *= load(job.scales + row);
      float result[W];
      store(result, total);
      for (int lane = 0; lane < valid; ++lane) {
        const int64_t at = t * job.out_stride + row + lane;
        float y = result[lane] + (job.bias ? job.bias[row + lane] : 0.0f) + (job.residual ? job.residual[at] : 0.0f);
        y = y < job.low ? job.low : y;
        job.out[at] = y > job.high ? job.high : y;
      }
    }
  }
}

template <int Tokens, int Block, Storage Stored>
void rows_of(const RowJob& job) {
  constexpr int kMost = entries_of_word(Block);
  switch (job.blocks_per_word) {
    case kMost: return row_blocks<Tokens, kMost, Block, Stored>(job);
    case kMost / 2: return row_blocks<Tokens, kMost / 2, Block, Stored>(job);
    case kMost / 4: return row_blocks<Tokens, kMost / 4, Block, Stored>(job);
    default: return row_blocks<Tokens, 1, Block, Stored>(job);  // of more entries than four: whole words
  }
}

template <int Tokens, Storage Stored>
void rows_stored(const RowJob& job) {
  if (job.block == 4) return rows_of<Tokens, 4, Stored>(job);
  return job.block == W ? rows_of<Tokens, W, Stored>(job) : rows_of<Tokens, 16, Stored>(job);
}

template <int Tokens>
void rows_for(const RowJob& job) {
  switch (job.storage) {
    case Storage::kHalves: return rows_stored<Tokens, Storage::kHalves>(job);
    case Storage::kBrains: return rows_stored<Tokens, Storage::kBrains>(job);
    case Storage::kBytes: return rows_stored<Tokens, Storage::kBytes>(job);
    default: return rows_stored<Tokens, Storage::kFloats>(job);
  }
}

// `tokens` is 1, 2 or 4.
void rows(const RowJob& job) {
  if (job.tokens == 1) return rows_for<1>(job);
  return job.tokens == 2 ? rows_for<2>(job) : rows_for<4>(job);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposes between [tokens][columns] and panels [columns][tokens].

// W rows of W: rounds that swap blocks of 1, 2, 4 … lanes between rows as far apart, so that only the last ones cross the halves of a
// vector.
template <int Lanes>
inline void swap_blocks(Vector (&v)[W]) {
  Ints low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i & Lanes ? W + i - Lanes : i;
    high[i] = low[i] + Lanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Lanes) continue;
    const Vector above = v[i], below = v[i + Lanes];
    v[i] = __builtin_shuffle(above, below, low);
    v[i + Lanes] = __builtin_shuffle(above, below, high);
  }
  if constexpr (2 * Lanes < W) swap_blocks<2 * Lanes>(v);
}
inline void transpose(Vector (&v)[W]) { swap_blocks<1>(v); }

void pack_tokens(const float* x, int64_t x_stride, int64_t tokens, int64_t columns, float* panel, int64_t panel_width) {
  for (int64_t token = 0; token < panel_width; token += W) {
    const int64_t valid = tokens - token < 0 ? 0 : tokens - token < W ? tokens - token : W;
    const float* from = x + token * x_stride;
    int64_t column = 0;
    for (; column + W <= columns; column += W) {
      Vector v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = i < valid ? load(from + i * x_stride + column) : Vector{};
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(panel + (column + i) * panel_width + token, v[i]);
    }
    for (; column < columns; ++column)
      for (int i = 0; i < W; ++i) panel[column * panel_width + token + i] = i < valid ? from[i * x_stride + column] : 0.0f;
  }
}

void unpack_tokens(const float* panel, int64_t panel_width, int64_t rows, int64_t tokens, const float* residual, float* y,
                   int64_t y_stride, float low, float high) {
  const Vector lows = splat(low), highs = splat(high);
  for (int64_t token = 0; token < tokens; token += W) {
    const int64_t valid = tokens - token < W ? tokens - token : W;
    int64_t row = 0;
    for (; row + W <= rows; row += W) {
      Vector v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(panel + (row + i) * panel_width + token);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i >= valid) break;
        const int64_t at = (token + i) * y_stride + row;
        store(y + at, clip(residual ? v[i] + load(residual + at) : v[i], lows, highs));
      }
    }
    for (; row < rows; ++row)
      for (int64_t i = 0; i < valid; ++i) {
        const int64_t at = (token + i) * y_stride + row;
        float out = panel[row * panel_width + token + i] + (residual ? residual[at] : 0.0f);
        out = out < low ? low : out;
        y[at] = out > high ? high : out;
      }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations.

#include "activations.inl"

template <typename Function>
inline void each(float* y, int64_t count, Function function) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(y + i, function(load(y + i)));
  if (i == count) return;
  float rest[W] = {};
  for (int64_t j = 0; j < count - i; ++j) rest[j] = y[i + j];
  store(rest, function(load(rest)));
  for (int64_t j = 0; j < count - i; ++j) y[i + j] = rest[j];
}

// A loop for each: with the choice inside it, its constants are fetched for every vector.
void activate(float* y, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return each(y, count, [](Vector x) { return activated(x, Activation::kSilu); });
    case Activation::kGelu: return each(y, count, [](Vector x) { return activated(x, Activation::kGelu); });
    case Activation::kGeluTanh: return each(y, count, [](Vector x) { return activated(x, Activation::kGeluTanh); });
    default: return;
  }
}

#include "pixels.inl"
#include "prune.inl"
#include "masking.inl"

template <int N, int R>
constexpr Tile tile() {
  return {N, R, stream<N, R>};
}

// Eight sums or more cover the latency of a product; more rows than one halve what their ends cost.
#if NMC_REGISTERS >= 32
#define NMC_TILES {tile<1, 8>(), tile<2, 8>(), tile<4, 4>(), tile<6, 2>(), tile<7, 2>(), tile<8, 2>()}
#else
#define NMC_TILES {tile<1, 8>(), tile<2, 4>(), tile<4, 2>(), tile<7, 1>(), tile<8, 1>(), tile<13, 1>()}
#endif

constexpr Isa kIsa = {
    NMC_NAME,
    W,
    NMC_TILES,
    rows,
    pack_tokens,
    unpack_tokens,
    activate,
    pad,
    every,
    gather,
    gather_strips,
    turn_pixels,
    finish,
    {prune_rows<Single>, prune_rows<Half>, prune_rows<Brain>, prune_rows<Double>},
    {renew_mask<Single>, renew_mask<Double>},
    {masked<float>, masked<double>},
    {add_pruned<float>, add_pruned<double>},
    nullptr,
    false,
};

}  // namespace NMC_NAMESPACE

const Isa* NMC_FACTORY() { return &NMC_NAMESPACE::kIsa; }

}  // namespace nmconvert
