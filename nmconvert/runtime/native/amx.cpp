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
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of L by R tiles of the output, at most four, which stay in registers 0 to 3 from the first step to the last.

constexpr int64_t kBytes = 2 * kTileSize;  // of a tile

// Tiles of weights, unpacked for the next step a few lines at a time between the products, which leave the vector units idle.
template <int Tiles>
struct Unpacker {
  const uint32_t* masks[Tiles];
  const uint16_t* from[Tiles];
  uint16_t* out;  // [tile][kTileSize]

  void start(const AmxJob& job, int64_t first_tile, int64_t step, uint16_t* to) {
    for (int i = 0; i < Tiles; ++i) {
      const int64_t tile = (first_tile + i) * job.steps + step;
      masks[i] = job.masks + tile * kTileLines;
      from[i] = job.values + job.starts[tile];
    }
    out = to;
  }

  // What one part of the inputs leaves time for.
  template <int Part>
  void lines() {
    constexpr int kAll = Tiles * kTileLines, kEach = (kAll + kParts - 1) / kParts;
    constexpr int kFirst = Part * kEach, kLast = kFirst + kEach < kAll ? kFirst + kEach : kAll;
#pragma GCC unroll 32
    for (int i = kFirst; i < kLast; ++i) {
      const int tile = i / kTileLines, line = i % kTileLines;
      const __mmask32 mask = masks[tile][line];
      _mm512_store_si512(out + i * kTileColumns, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from[tile])));
      from[tile] += __builtin_popcount(mask);
    }
  }

  void all() {
    lines<0>();
    lines<1>();
    lines<2>();
  }
};

// Where the tiles of one side stand: bytes from line to line and from tile to tile.
struct Operand {
  const char* tiles;
  int64_t line, tile;
};

template <int First, int Count>
inline void load_tiles(const Operand& operand, int64_t at = 0) {
  load<First>(operand.tiles + at, operand.line);
  if constexpr (Count > 1) load_tiles<First + 1, Count - 1>(operand, at + operand.tile);
}

// Two rows of tiles by R, whose operands stand in registers 4 to 7.
template <int R>
inline void multiply_two() {
  multiply<0, 4, 6>();
  if constexpr (R > 1) multiply<1, 4, 7>();
  multiply<R, 5, 6>();
  if constexpr (R > 1) multiply<R + 1, 5, 7>();
}

// One row: the right tiles take turns in registers 5 to 7, so that no sum is needed again at once.
template <int R, int J = 0>
inline void multiply_one(const Operand& right) {
  load<5 + J % 3>(right.tiles + J * right.tile, right.line);
  multiply<J, 4, 5 + J % 3>();
  if constexpr (J + 1 < R) multiply_one<R, J + 1>(right);
}

// One part of the inputs; the weights, where there are two rows, are in their registers already.
template <bool WeightsLeft, int L, int R, int Part, typename Next>
inline void multiply_part(const Operand& weights, Operand inputs, int64_t part, Next& next) {
  inputs.tiles += Part * part;
  if constexpr (L == 2) {
    if constexpr (WeightsLeft) load_tiles<6, R>(inputs);
    if constexpr (!WeightsLeft) load_tiles<4, 2>(inputs);
    multiply_two<R>();
  } else {
    if constexpr (!WeightsLeft) load<4>(inputs.tiles, inputs.line);
    multiply_one<R>(WeightsLeft ? inputs : weights);
  }
  next.template lines<Part>();
}

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

template <bool WeightsLeft, int L, int R>
void block(const AmxJob& job, int64_t left, int64_t right) {
  constexpr int kWeights = WeightsLeft ? L : R;
  alignas(64) uint16_t unpacked[2][kWeights * kTileSize];
  const int64_t first_weight = WeightsLeft ? left : right;
  const char* first_input = static_cast<const char*>(job.inputs) + (WeightsLeft ? right : left) * job.tile;
  Unpacker<kWeights> next;
  next.start(job, first_weight, 0, unpacked[0]);
  next.all();
  begin<0, L, R>(job, left, right);
  for (int64_t step = 0; step < job.steps; ++step) {
    const Operand weights{reinterpret_cast<const char*>(unpacked[step % 2]), 64, kBytes};
    const Operand inputs{first_input + job.offsets[step], job.line, job.tile};
    next.start(job, first_weight, step + 1 < job.steps ? step + 1 : step, unpacked[(step + 1) % 2]);
    if constexpr (WeightsLeft) load_tiles<4, L>(weights);
    if constexpr (!WeightsLeft && L == 2) load_tiles<6, R>(weights);
    multiply_part<WeightsLeft, L, R, 0>(weights, inputs, job.part, next);
    multiply_part<WeightsLeft, L, R, 1>(weights, inputs, job.part, next);
    multiply_part<WeightsLeft, L, R, 2>(weights, inputs, job.part, next);
  }
  end<0, L, R>(job, left, right);
}

template <bool WeightsLeft>
void multiply_all(const AmxJob& job) {
  configure();
  int64_t left = 0;
  for (; left + 2 <= job.lefts; left += 2) {
    int64_t right = 0;
    for (; right + 2 <= job.rights; right += 2) block<WeightsLeft, 2, 2>(job, left, right);
    if (right < job.rights) block<WeightsLeft, 2, 1>(job, left, right);
  }
  if (left < job.lefts) {
    int64_t right = 0;
    for (; right + 4 <= job.rights; right += 4) block<WeightsLeft, 1, 4>(job, left, right);
    if (right + 2 <= job.rights) block<WeightsLeft, 1, 2>(job, left, right), right += 2;
    if (right < job.rights) block<WeightsLeft, 1, 1>(job, left, right);
  }
  release();
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs in parts, and sums times scales.

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
    multiply_all<true>,
    multiply_all<false>,
    scale,
};

}  // namespace

const Amx* amx_loops() { return &kAmx; }

}  // namespace nmconvert

#else

const nmconvert::Amx* nmconvert::amx_loops() { return nullptr; }

#endif
