#include "amx.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AVX512VBMI2__)
#include <immintrin.h>

#include "isa.h"

namespace nmconvert {
namespace {

// Nothing of the standard library here: see kernels.inl.

// ---------------------------------------------------------------------------------------------------------------------
// The unit's eight registers. Compilers' own intrinsics take literals, not template arguments.

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline void configure() {
  static constexpr Configuration configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}
inline void release() { asm volatile("tilerelease"); }

template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* from, int64_t line) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(line), "i"(T) : "memory");
}
template <int T>
inline void store(void* to, int64_t line) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(line), "i"(T) : "memory");
}
// sum += left · right
template <int Sum, int Left, int Right>
inline void multiply() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors, by the names of kernels.inl.

using Vector = __m512;
typedef int32_t Ints __attribute__((vector_size(64)));
inline Vector splat(float x) { return _mm512_set1_ps(x); }
inline Vector clip(Vector v, Vector low, Vector high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); }
#include "activations.inl"

// Of a vector those lanes that `left` floats fill.
inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of the output: one tile, or two that share their inputs or their weights. Each has three sums, by the weight of their
// digits, in registers 0 to 5; operands pass through 6 and 7. Between the products, which leave the vector units idle, these make
// floats of the sums of the block before, and unpack the weights that come next.

constexpr int kWeights = 6, kInputs = 7;
constexpr int kSums = kTileLines * kTileLines;  // of a tile

// The digits of a weight and of an input whose product is a term of sum weight + input: in an order in which neighbours share an
// operand.
struct Term {
  int weight, input;
};
template <int Digits>
struct Terms;
template <>
struct Terms<1> {
  static constexpr int kCount = 3;
  static constexpr Term kAll[kCount] = {{0, 2}, {0, 1}, {0, 0}};
};
template <>
struct Terms<kDigits> {
  static constexpr int kCount = 6;
  static constexpr Term kAll[kCount] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
};

// `Tiles` tiles of weights at one step.
template <int Digits, int Tiles>
class Unpacker {
 public:
  Unpacker() = default;
  Unpacker(const AmxJob& job, int64_t first_tile, int64_t step, int8_t* to) : kept_(job.kept), to_(to) {
    for (int i = 0; i < Tiles; ++i) {
      const int64_t tile = (first_tile + i) * job.steps + step;
      masks_[i] = job.masks + tile * kTileLines;
      from_[i] = job.values + job.starts[tile];
    }
  }

  // What the products of one term leave time for.
  template <int T>
  void lines() {
    constexpr int kAll = Tiles * kTileLines, kTerms = Terms<Digits>::kCount;
#pragma GCC unroll 32
    for (int i = kAll * T / kTerms; i < kAll * (T + 1) / kTerms; ++i) {
      const int tile = i / kTileLines, line = i % kTileLines;
      const __mmask64 mask = masks_[tile][line];
      int8_t* to = to_ + tile * Digits * kTileSize + line * kTileColumns;
#pragma GCC unroll 3
      for (int d = 0; d < Digits; ++d)
        _mm512_store_si512(to + d * kTileSize, _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(from_[tile] + d * kept_)));
      from_[tile] += __builtin_popcountll(mask);
    }
  }

  template <int T = 0>
  void all() {
    lines<T>();
    if constexpr (T + 1 < Terms<Digits>::kCount) all<T + 1>();
  }

 private:
  const uint64_t* masks_[Tiles];
  const int8_t* from_[Tiles];
  int64_t kept_;
  int8_t* to_ = nullptr;  // [tile][digit][kTileSize]
};

// The three sums of each tile of a block.
template <bool WeightsLeft, int Tiles>
struct Sums {
  static constexpr int kLines = Tiles * kTileLines;
  alignas(64) int32_t of[Tiles][kDigits][kSums];
  int64_t left[Tiles], right[Tiles];

  template <int I = 0>
  void store_all() {
    store<I>(of[I / kDigits][I % kDigits], 4 * kTileLines);
    if constexpr (I + 1 < Tiles * kDigits) store_all<I + 1>();
  }

  // A line as floats: times a scale, plus a bias, and on its way out.
  template <bool Activates>
  void line(const AmxJob& job, int tile, int i) const {
    const int64_t line = left[tile] * kTileLines + i, column = right[tile] * kTileLines;
    if (line >= job.lines) return;
    const __mmask16 mask = lanes(job.columns - column);
    const auto floats = [&](int order) { return _mm512_cvtepi32_ps(_mm512_load_si512(of[tile][order] + i * kTileLines)); };
    const Vector shift = splat(1.f / 256), scale = splat(job.line_scales[line]);
    Vector sum = _mm512_fmadd_ps(_mm512_fmadd_ps(floats(2), shift, floats(1)), shift, floats(0));
    if constexpr (!WeightsLeft) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(job.column_scales + column));
    const Vector bias = WeightsLeft ? splat(job.bias[line]) : _mm512_loadu_ps(job.bias + column);
    sum = _mm512_fmadd_ps(sum, scale, bias);
    const int64_t at = line * job.out_line + column;
    if (job.residual) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, job.residual + at));
    sum = clip(sum, splat(job.low), splat(job.high));  // NaN stays
    if constexpr (Activates) sum = activated(sum, job.activation);
    _mm512_mask_storeu_ps(job.out + at, mask, sum);
  }

  // What the products of one of `Count` terms leave time for.
  template <int Count, int T>
  void lines(const AmxJob& job) const {
#pragma GCC unroll 4
    for (int i = kLines * T / Count; i < kLines * (T + 1) / Count; ++i) line<false>(job, i / kTileLines, i % kTileLines);
  }

  // Lines `first` … `last` - 1 with an activation, which takes longer than the products of a step.
  __attribute__((noinline)) void activated_lines(const AmxJob& job, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last && i < kLines; ++i) line<true>(job, static_cast<int>(i / kTileLines), i % kTileLines);
  }
};

template <bool WeightsLeft, int Digits, int Inputs, int Weights>
class Blocks {
 public:
  explicit Blocks(const AmxJob& job) : job_(job) {
    const int64_t terms = job.steps * All::kCount;
    if (activates(job.activation)) activated_at_once_ = (BlockSums::kLines + terms - 1) / terms;
  }

  // All pairs of these tiles, whose numbers are multiples of `Inputs` and `Weights`. Weights are unpacked a step ahead while they meet
  // their first inputs, and stay for the others.
  void operator()(int64_t input, int64_t last_input, int64_t weight, int64_t last_weight) {
    if (input == last_input || weight == last_weight) return;
    slots_ = input + Inputs < last_input ? job_.steps + 1 : 2;
    Unpacker<Digits, Weights>(job_, weight, 0, unpacked(0)).all();
    for (; weight < last_weight; weight += Weights) {
      const int64_t follows = weight + Weights < last_weight ? weight + Weights : -1;
      for (int64_t i = input; i < last_input; i += Inputs) block(i, weight, i == input, i + Inputs == last_input ? follows : -1);
      first_slot_ = (first_slot_ + job_.steps) % slots_;
    }
    sums_[now_ ^ 1].activated_lines(job_, 0, BlockSums::kLines);
  }

 private:
  static constexpr int kTiles = Inputs * Weights;
  using All = Terms<Digits>;
  using BlockSums = Sums<WeightsLeft, kTiles>;

  int8_t* unpacked(int64_t slot) const { return job_.unpacked + slot * Weights * Digits * kTileSize; }

  // `first` inputs of their weights unpack the rest of these; the last ones begin with those that follow, if any.
  void block(int64_t input, int64_t weight, bool first, int64_t follows) {
    zero_all();
    const char* inputs = static_cast<const char*>(job_.inputs) + input * job_.tile;
    int64_t slot = first_slot_;
    for (int64_t step = 0; step < job_.steps; ++step) {
      const int8_t* weights = unpacked(slot);
      if (++slot == slots_) slot = 0;
      const bool within = step + 1 < job_.steps, unpacks = within ? first : follows >= 0;
      Unpacker<Digits, Weights> unpack;
      if (unpacks) unpack = {job_, within ? weight : follows, within ? step + 1 : 0, unpacked(slot)};
      multiply_step(inputs + step * job_.step, weights, unpacks, unpack, step);
    }
    BlockSums& sums = sums_[now_];
    sums.store_all();
    for (int i = 0; i < kTiles; ++i) {
      const int64_t of_input = input + i % Inputs, of_weight = weight + i / Inputs;
      sums.left[i] = WeightsLeft ? of_weight : of_input;
      sums.right[i] = WeightsLeft ? of_input : of_weight;
    }
    filled_ = true;
    now_ ^= 1;
  }

  template <int I = 0>
  static void zero_all() {
    zero<I>();
    if constexpr (I + 1 < kTiles * kDigits) zero_all<I + 1>();
  }

  template <int Digit, int Tile>
  void load_input(const char* inputs) const {
    load<kInputs>(inputs + Digit * job_.digit + (Inputs > 1 ? Tile : 0) * job_.tile, job_.line);
  }
  template <int Digit, int Tile>
  static void load_weight(const int8_t* weights) {
    load<kWeights>(weights + ((Weights > 1 ? Tile : 0) * Digits + Digit) * kTileSize, kTileColumns);
  }
  template <int Sum>
  static void add() {
    if constexpr (WeightsLeft) multiply<Sum, kWeights, kInputs>();
    if constexpr (!WeightsLeft) multiply<Sum, kInputs, kWeights>();
  }

  template <int T = 0>
  void multiply_step(const char* inputs, const int8_t* weights, bool unpacks, Unpacker<Digits, Weights>& unpack, int64_t step) {
    constexpr Term term = All::kAll[T], before = T ? All::kAll[T - 1] : Term{-1, -1};
    constexpr int kSum = term.weight + term.input, kFirst = kTiles > 1 ? T % 2 : 0;  // the tile of the product before
    if constexpr (term.input != before.input) load_input<term.input, kFirst>(inputs);
    if constexpr (term.weight != before.weight) load_weight<term.weight, kFirst>(weights);
    add<kFirst * kDigits + kSum>();
    if constexpr (Inputs > 1) load_input<term.input, 1 - kFirst>(inputs);
    if constexpr (Weights > 1) load_weight<term.weight, 1 - kFirst>(weights);
    if constexpr (kTiles > 1) add<(1 - kFirst) * kDigits + kSum>();
    if (unpacks) unpack.template lines<T>();
    if (filled_ && activated_at_once_) {
      const int64_t first = (step * All::kCount + T) * activated_at_once_;
      if (first < BlockSums::kLines) sums_[now_ ^ 1].activated_lines(job_, first, first + activated_at_once_);
    } else if (filled_ && step == 0) {
      sums_[now_ ^ 1].template lines<All::kCount, T>(job_);
    }
    if constexpr (T + 1 < All::kCount) multiply_step<T + 1>(inputs, weights, unpacks, unpack, step);
  }

  const AmxJob& job_;
  int64_t slots_ = 0, first_slot_ = 0;  // of unpacked steps, in a ring
  BlockSums sums_[2];
  int now_ = 0;                    // which of them the next block fills
  bool filled_ = false;            // the other holds a block
  int64_t activated_at_once_ = 0;  // its lines that go out beside the products of a term, if they are activated
};

// Pairs of input tiles with all tiles of weights, and a last one with pairs of weights.
template <bool WeightsLeft, int Digits>
void multiply_all(const AmxJob& job) {
  const int64_t inputs = WeightsLeft ? job.rights : job.lefts, weights = WeightsLeft ? job.lefts : job.rights;
  const int64_t even_inputs = inputs / 2 * 2, even_weights = weights / 2 * 2;
  configure();
  Blocks<WeightsLeft, Digits, 2, 1>{job}(0, even_inputs, 0, weights);
  Blocks<WeightsLeft, Digits, 1, 2>{job}(even_inputs, inputs, 0, even_weights);
  Blocks<WeightsLeft, Digits, 1, 1>{job}(even_inputs, inputs, even_weights, weights);
  release();
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs in digits.

Range range(const float* x, int64_t count) {
  constexpr int kAtOnce = 4;
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
  __m512i largest[kAtOnce] = {};  // as integers, among which NaN is the largest
  __m512 sums[kAtOnce] = {};
  for (int64_t i = 0; i < count; i += 16 * kAtOnce) {
#pragma GCC unroll 4
    for (int s = 0; s < kAtOnce; ++s) {
      const __m512 some = _mm512_maskz_loadu_ps(lanes(count - i - 16 * s), x + i + 16 * s);
      const __m512i values = _mm512_and_si512(_mm512_castps_si512(some), absolute);
      largest[s] = _mm512_max_epi32(largest[s], values);
      sums[s] += _mm512_castsi512_ps(values);
    }
  }
  for (int s = 1; s < kAtOnce; ++s) largest[0] = _mm512_max_epi32(largest[0], largest[s]), sums[0] += sums[s];
  const int bits = _mm512_reduce_max_epi32(largest[0]);
  Range range;
  __builtin_memcpy(&range.largest, &bits, sizeof bits);
  range.sum = _mm512_reduce_add_ps(sums[0]);
  return range;
}

// Integers whose bytes are the digits, the lowest first; the fourth is of no use.
inline __m512i digits_of(__m512 x, __m512 scale) {
  const __m512i middle = _mm512_set1_epi32(0x8080);
  return _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, scale)), middle), middle);
}

void split(const float* x, int64_t count, int64_t padded, float scale, int8_t* digits, int64_t digit) {
  const __m512 factor = _mm512_set1_ps(scale);
  // Within a lane: first bytes of four integers, second ones, third ones, fourth ones.
  const __m512i by_digit = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < padded; i += kTileColumns) {
    __m512i quads[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 some = _mm512_maskz_loadu_ps(lanes(count - i - 16 * v), x + i + 16 * v);
      quads[v] = _mm512_shuffle_epi8(digits_of(some, factor), by_digit);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(quads[0], quads[1]), low23 = _mm512_unpacklo_epi32(quads[2], quads[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(quads[0], quads[1]), high23 = _mm512_unpackhi_epi32(quads[2], quads[3]);
    const __m512i planes[kDigits] = {_mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(low01, low23),
                                     _mm512_unpacklo_epi64(low01, low23)};
#pragma GCC unroll 3
    for (int d = 0; d < kDigits; ++d) _mm512_storeu_si512(digits + d * digit + i, _mm512_permutexvar_epi32(in_order, planes[d]));
  }
}

void split_quads(const float* const* channels, const Segment* segments, int64_t count, float scale, uint32_t* digits, int64_t digit) {
  const __m512 factor = _mm512_set1_ps(scale);
  constexpr __mmask64 kOddBytes = 0xaaaaaaaaaaaaaaaa;
  constexpr __mmask32 kOddHalves = 0xaaaaaaaa;
  for (int64_t s = 0; s < count; ++s) {
    const Segment segment = segments[s];
    for (int64_t i = 0; i < segment.count; i += 16) {
      const __mmask16 mask = lanes(segment.count - i);
      __m512i values[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const bool zeros = segment.from < 0 || !channels[c];
        values[c] = zeros ? _mm512_setzero_si512() : digits_of(_mm512_maskz_loadu_ps(mask, channels[c] + segment.from + i), factor);
      }
      // Bytes 0 and 2 of two channels side by side, and 1 and 3; then halves of two such pairs.
      const auto even = [](__m512i a, __m512i b) { return _mm512_mask_blend_epi8(kOddBytes, a, _mm512_slli_epi32(b, 8)); };
      const auto odd = [](__m512i a, __m512i b) { return _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi32(a, 8), b); };
      const auto low = [](__m512i a, __m512i b) { return _mm512_mask_blend_epi16(kOddHalves, a, _mm512_slli_epi32(b, 16)); };
      const auto high = [](__m512i a, __m512i b) { return _mm512_mask_blend_epi16(kOddHalves, _mm512_srli_epi32(a, 16), b); };
      const __m512i even01 = even(values[0], values[1]), even23 = even(values[2], values[3]);
      const __m512i planes[kDigits] = {high(even01, even23), low(odd(values[0], values[1]), odd(values[2], values[3])), low(even01, even23)};
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) _mm512_mask_storeu_epi32(digits + d * digit / 4 + segment.to + i, mask, planes[d]);
    }
  }
}

constexpr Amx kAmx = {
    range,
    split,
    split_quads,
    {multiply_all<true, 1>, multiply_all<true, kDigits>},
    {multiply_all<false, 1>, multiply_all<false, kDigits>},
};

}  // namespace

const Amx* amx_loops() { return &kAmx; }

}  // namespace nmconvert

#else

const nmconvert::Amx* nmconvert::amx_loops() { return nullptr; }

#endif
