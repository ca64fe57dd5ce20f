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
  static const Configuration configuration;
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
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of L by R tiles of the output, at most four, which stay in registers 0 to 3 from the first step to the last.

struct Operand {
  int64_t part, line, tile;  // bytes from part to part, line to line, tile to tile
};

// The parts that are multiplied: all pairs that matter, in an order in which one side stays where it is. Weights of fewer parts
// than three begin further on.
constexpr int kProducts = 6;
constexpr int kWeightPart[kProducts] = {2, 1, 1, 0, 0, 0}, kInputPart[kProducts] = {0, 0, 1, 1, 0, 2};
constexpr int first_product(int parts) { return parts == 3 ? 0 : parts == 2 ? 1 : 3; }

// Tiles of weights, unpacked for the next step a few lines at a time between the products, which leave the vector units idle.
template <int Tiles, int Parts>
struct Unpacker {
  const uint32_t* masks[Tiles];
  const uint16_t* from[Tiles];
  int64_t kept[Tiles];
  uint16_t* out;  // [tile][part][kTileSize]

  void start(const AmxJob& job, int64_t first_tile, int64_t step, uint16_t* to) {
    for (int i = 0; i < Tiles; ++i) {
      const int64_t tile = (first_tile + i) * job.steps + step;
      masks[i] = job.masks + tile * kTileLines;
      from[i] = job.parts + Parts * static_cast<int64_t>(job.starts[tile]);
      kept[i] = job.starts[tile + 1] - job.starts[tile];
    }
    out = to;
  }

  template <int Product>
  void lines() {
    constexpr int kCount = kProducts - first_product(Parts), kAll = Tiles * kTileLines, kEach = (kAll + kCount - 1) / kCount;
    constexpr int kFirst = (Product - first_product(Parts)) * kEach, kLast = kFirst + kEach < kAll ? kFirst + kEach : kAll;
#pragma GCC unroll 32
    for (int i = kFirst; i < kLast; ++i) {
      const int tile = i / kTileLines, line = i % kTileLines;
      const __mmask32 mask = masks[tile][line];
#pragma GCC unroll 3
      for (int part = 0; part < Parts; ++part)
        _mm512_store_si512(out + (tile * Parts + part) * kTileSize + line * kTileColumns,
                           _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from[tile] + part * kept[tile])));
      from[tile] += __builtin_popcount(mask);
    }
  }

  template <int Product = first_product(Parts)>
  void all() {
    lines<Product>();
    if constexpr (Product + 1 < kProducts) all<Product + 1>();
  }
};

template <int First, int Count>
inline void load_tiles(const char* from, const Operand& operand) {
  load<First>(from, operand.line);
  if constexpr (Count > 1) load_tiles<First + 1, Count - 1>(from + operand.tile, operand);
}

// One step of a block, product by product. Weights are on the left or on the right.
template <bool WeightsLeft, int L, int R, int Parts>
struct Step {
  using Next = Unpacker<WeightsLeft ? L : R, Parts>;
  const Operand &left, &right;
  const char *from_left, *from_right;

  template <int Product>
  static constexpr bool changes(const int (&part)[kProducts]) {
    return Product == first_product(Parts) || part[Product] != part[Product - 1];
  }
  static constexpr auto& kLeft = WeightsLeft ? kWeightPart : kInputPart;
  static constexpr auto& kRight = WeightsLeft ? kInputPart : kWeightPart;

  // Two rows of tiles: all four operands in registers.
  template <int Product>
  void two(Next& next) const {
    if constexpr (changes<Product>(kLeft)) load_tiles<4, 2>(from_left + kLeft[Product] * left.part, left);
    if constexpr (changes<Product>(kRight)) load_tiles<6, R>(from_right + kRight[Product] * right.part, right);
    multiply<0, 4, 6>();
    if constexpr (R > 1) multiply<1, 4, 7>();
    multiply<R, 5, 6>();
    if constexpr (R > 1) multiply<R + 1, 5, 7>();
    next.template lines<Product>();
    if constexpr (Product + 1 < kProducts) two<Product + 1>(next);
  }

  // One row: the right tiles take turns in registers 5 to 7, so that no sum is needed again at once.
  template <int Product>
  void one(Next& next) const {
    if constexpr (changes<Product>(kLeft)) load<4>(from_left + kLeft[Product] * left.part, left.line);
    row<0>(from_right + kRight[Product] * right.part);
    next.template lines<Product>();
    if constexpr (Product + 1 < kProducts) one<Product + 1>(next);
  }
  template <int J>
  void row(const char* from) const {
    load<5 + J % 3>(from + J * right.tile, right.line);
    multiply<J, 4, 5 + J % 3>();
    if constexpr (J + 1 < R) row<J + 1>(from);
  }

  void operator()(Next& next) const {
    if constexpr (L == 2) two<first_product(Parts)>(next);
    if constexpr (L == 1) one<first_product(Parts)>(next);
  }
};

template <int I, int L, int R>
inline void begin(const AmxJob& job, int64_t left, int64_t right) {
  if (job.start) {
    load<I>(job.start + (left + I / R) * job.start_left + (right + I % R) * job.start_right, 4 * job.start_line);
  } else {
    zero<I>();
  }
  if constexpr (I + 1 < L * R) begin<I + 1, L, R>(job, left, right);
}
template <int I, int L, int R>
inline void end(const AmxJob& job, int64_t left, int64_t right) {
  store<I>(job.out + (left + I / R) * kTileLines * job.out_line + (right + I % R) * kTileLines, 4 * job.out_line);
  if constexpr (I + 1 < L * R) end<I + 1, L, R>(job, left, right);
}

constexpr int64_t kBytes = 2 * kTileSize;  // of a tile

template <bool WeightsLeft, int L, int R, int Parts>
void block(const AmxJob& job, int64_t left, int64_t right) {
  constexpr int kWeights = WeightsLeft ? L : R;
  alignas(64) uint16_t unpacked[2][kWeights * Parts * kTileSize];
  const Operand weights{kBytes, 64, Parts * kBytes}, inputs{job.part, job.line, job.tile};
  const Operand &on_left = WeightsLeft ? weights : inputs, &on_right = WeightsLeft ? inputs : weights;
  const char* first_input = static_cast<const char*>(job.inputs) + (WeightsLeft ? right : left) * job.tile;
  const int64_t first_weight = WeightsLeft ? left : right;
  Unpacker<kWeights, Parts> next;
  next.start(job, first_weight, 0, unpacked[0]);
  next.all();
  begin<0, L, R>(job, left, right);
  for (int64_t step = 0; step < job.steps; ++step) {
    const char *of_weights = reinterpret_cast<const char*>(unpacked[step % 2]), *of_inputs = first_input + job.offsets[step];
    next.start(job, first_weight, step + 1 < job.steps ? step + 1 : step, unpacked[(step + 1) % 2]);
    Step<WeightsLeft, L, R, Parts>{on_left, on_right, WeightsLeft ? of_weights : of_inputs, WeightsLeft ? of_inputs : of_weights}(next);
  }
  end<0, L, R>(job, left, right);
}

template <bool WeightsLeft, int Parts>
void multiply_all(const AmxJob& job) {
  configure();
  int64_t left = 0;
  for (; left + 2 <= job.lefts; left += 2) {
    int64_t right = 0;
    for (; right + 2 <= job.rights; right += 2) block<WeightsLeft, 2, 2, Parts>(job, left, right);
    if (right < job.rights) block<WeightsLeft, 2, 1, Parts>(job, left, right);
  }
  if (left < job.lefts) {
    int64_t right = 0;
    for (; right + 4 <= job.rights; right += 4) block<WeightsLeft, 1, 4, Parts>(job, left, right);
    if (right + 2 <= job.rights) block<WeightsLeft, 1, 2, Parts>(job, left, right), right += 2;
    if (right < job.rights) block<WeightsLeft, 1, 1, Parts>(job, left, right);
  }
  release();
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights and inputs in parts.

// Takes from `x` what bfloat16 holds of it, in the upper half of each lane.
inline __m512i take(__m512& x) {
  const __m512i near = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(-0x10000));
  x -= _mm512_castsi512_ps(near);
  return near;
}

void split(const float* x, int64_t count, int64_t padded, uint16_t* parts, int64_t part) {
  alignas(64) static constexpr uint16_t kUpper[kTileColumns] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                                33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper_halves = _mm512_load_si512(kUpper);
  for (int64_t i = 0; i < padded; i += kTileColumns) {
    const int64_t left = count - i;
    const uint32_t mask = left >= kTileColumns ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x + i);
    __m512 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + i + 16);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; ++p) {
      const __m512i of_first = take(first), of_second = take(second);
      _mm512_storeu_si512(parts + p * part + i, _mm512_permutex2var_epi16(of_first, upper_halves, of_second));
    }
  }
}

void split_pairs(const float* even, const float* odd, const Segment* segments, int64_t count, uint32_t* parts, int64_t part) {
  for (int64_t s = 0; s < count; ++s) {
    const Segment segment = segments[s];
    for (int64_t i = 0; i < segment.count; i += 16) {
      const int64_t left = segment.count - i;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const bool zeros = segment.from < 0;
      __m512 first = zeros ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, even + segment.from + i);
      __m512 second = zeros || !odd ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, odd + segment.from + i);
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) {
        const __m512i of_first = take(first), of_second = take(second);
        _mm512_mask_storeu_epi32(parts + p * part + segment.to + i, mask, _mm512_or_si512(_mm512_srli_epi32(of_first, 16), of_second));
      }
    }
  }
}

void scale(float* sums, int64_t rows, int64_t columns, const float* scales, const float* bias, bool by_row) {
  for (int64_t r = 0; r < rows; ++r, sums += columns)
    for (int64_t i = 0; i < columns; i += 16) {
      const __m512 factor = by_row ? _mm512_set1_ps(scales[r]) : _mm512_loadu_ps(scales + i);
      const __m512 start = !bias ? _mm512_setzero_ps() : by_row ? _mm512_set1_ps(bias[r]) : _mm512_loadu_ps(bias + i);
      _mm512_storeu_ps(sums + i, _mm512_loadu_ps(sums + i) * factor + start);
    }
}

constexpr Amx kAmx = {
    split,
    split_pairs,
    {multiply_all<true, 1>, multiply_all<true, 2>, multiply_all<true, 3>},
    {multiply_all<false, 1>, multiply_all<false, 2>, multiply_all<false, 3>},
    scale,
};

}  // namespace

const Amx* amx_loops() { return &kAmx; }

}  // namespace nmconvert

#else

const nmconvert::Amx* nmconvert::amx_loops() { return nullptr; }

#endif
