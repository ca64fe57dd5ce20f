// Convolutions: pixels into panels, sums into images; part of kernels.inl.

// The first `count` lanes, fewer than a vector.
inline Vector load_part(const float* p, int64_t count) {
#if NMC_WIDTH == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  Vector v = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
inline void store_part(float* p, Vector v, int64_t count) {
#if NMC_WIDTH == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

inline void zeros(float* to, int64_t count) {
  for (; count >= W; to += W, count -= W) store(to, Vector{});
  if (count > 0) store_part(to, Vector{}, count);
}

void pad(const float* from, int64_t rows, int64_t columns, int64_t before, int64_t pitch, float* to) {
  if (rows == 0) return;
  zeros(to, before);
  to += before;
  for (int64_t row = 0; row < rows; ++row, from += columns, to += pitch) {
    int64_t i = 0;
    for (; i + W <= columns; i += W) store(to + i, load(from + i));
    if (i < columns) store_part(to + i, load_part(from + i, columns - i), columns - i);
    zeros(to + columns, row + 1 < rows ? pitch - columns : pitch - columns - before);
  }
}

template <int Lanes>
struct Part {
  typedef float Floats __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  typedef int32_t Indices __attribute__((vector_size(4 * Lanes)));
};

// Every second float; the last `Lanes` of them together with some of those before, so that nothing beyond them is read.
template <int Lanes>
void every_second(const float* from, int64_t count, float* to) {
  typedef typename Part<Lanes>::Floats Floats;
  typename Part<Lanes>::Indices wanted;
  for (int lane = 0; lane < Lanes; ++lane) wanted[lane] = 2 * lane + (2 * lane < Lanes ? 0 : 1);
  for (int64_t i = 0; i < count; i += Lanes) {
    const int64_t at = i < count - Lanes ? i : count - Lanes;
    const Floats low = *reinterpret_cast<const Floats*>(from + 2 * at), high = *reinterpret_cast<const Floats*>(from + 2 * at + Lanes - 1);
    *reinterpret_cast<Floats*>(to + at) = __builtin_shuffle(low, high, wanted);
  }
}

void every(const float* from, int64_t stride, int64_t count, float* to) {
  if (stride == 2 && count >= 4) {
    if (W >= 16 && count >= 16) return every_second<W>(from, count, to);
    if (W >= 8 && count >= 8) return every_second<8>(from, count, to);
    return every_second<4>(from, count, to);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

constexpr int kAhead = 8;  // lines: channels lie too far apart for the processor to foresee

void gather(const float* from, const int64_t* offsets, int64_t columns, const Segment* segments, int64_t count, float* panel,
            int64_t panel_width) {
  for (int64_t column = 0; column < columns; ++column, panel += panel_width) {
    const float* source = from + offsets[column];
    const float* ahead = from + offsets[column + kAhead < columns ? column + kAhead : columns - 1];
    for (int64_t s = 0; s < count; ++s) {
      const float* read = source + segments[s].from;
      float* write = panel + segments[s].to;
      for (int64_t i = 0; i < segments[s].count; i += W) {
        __builtin_prefetch(ahead + segments[s].from + i);
        store(write + i, load(read + i));
      }
    }
  }
}

// The lanes from `left` to right - 1 of every Stride-th float, and zeros: the others may lie beyond the image, and are not read.
template <int Lanes, int Stride>
class Between {
 public:
  typedef typename Part<Lanes>::Floats Floats;
  typedef typename Part<Lanes>::Indices Indices;

  Between(int left, int right) {
    const Indices at = numbers();
    const auto inside = [&](Indices lane) { return (lane >= left) & (lane < right); };
    first_ = Stride == 1 ? inside(at) : inside(at >> 1) & ((at & 1) == 0);
    second_ = inside((at + (Lanes - 1)) >> 1) & ((at & 1) == 1);
  }

  Floats operator()(const float* p) const {
    return every([&](const float* from, Indices mask) { return masked(from, mask); }, p, first_, second_);
  }
  // The same of a vector whose lanes are all inside.
  static Floats whole(const float* p) {
    return every([](const float* from, Indices) { return *reinterpret_cast<const Floats*>(from); }, p, Indices{}, Indices{});
  }

 private:
  // Of two vectors every second float; the second starts a float early, because what follows it may lie beyond the image.
  template <typename Read>
  static Floats every(Read&& read, const float* p, Indices first, Indices second) {
    if (Stride == 1) return read(p, first);
    const Indices twice = 2 * numbers();
    return __builtin_shuffle(read(p, first), read(p + Lanes - 1, second), twice + ((twice >= Lanes) & 1));
  }

  static Indices numbers() {
    constexpr int32_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Indices numbers;
    __builtin_memcpy(&numbers, kNumbers, sizeof numbers);
    return numbers;
  }

  static Floats masked(const float* p, Indices mask) {
#if NMC_WIDTH == 16
    if constexpr (Lanes == 16) return _mm512_maskz_loadu_ps(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)), p);
#endif
#if NMC_WIDTH >= 8
    if constexpr (Lanes == 8) return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask));
    if constexpr (Lanes == 4) return _mm_maskload_ps(p, reinterpret_cast<__m128i>(mask));
#endif
    Floats v = {};
    for (int lane = 0; lane < Lanes; ++lane)
      if (mask[lane]) v[lane] = p[lane];
    return v;
  }

  Indices first_, second_;  // which floats of one vector are read, or of two
};

constexpr int kChannelsAhead = 3;  // as kAhead; their first line reads what the others will

template <int Pieces, int Stride>
void gather_pieces(const StripJob& job) {
  constexpr int kLanes = W / Pieces;
  typedef typename Part<kLanes>::Floats Floats;
  const Inside* inside = job.inside;
  float* panel = job.panel;
  for (int64_t line = 0, phase = 0; line < job.lines; ++line, panel += job.height * W) {
#pragma GCC unroll 4
    for (int piece = 0; piece < Pieces; ++piece) {
      const Inside here = *inside++;
      const float* read = job.from + job.offsets[line] + job.pieces[piece].from + here.first * job.step;
      float* write = panel + piece * kLanes;
      if (phase == 0 && line + kChannelsAhead * job.period < job.lines) {
        const float* ahead = read + job.offsets[line + kChannelsAhead * job.period] - job.offsets[line];
        for (int64_t row = here.first; row < here.last; ++row, ahead += job.step) __builtin_prefetch(ahead + here.left * Stride);
      }
      const auto zeros = [&](int64_t vectors) {
        for (; vectors > 0; --vectors, write += W) *reinterpret_cast<Floats*>(write) = Floats{};
      };
      const auto fill = [&](auto&& lanes) {
        for (int64_t v = here.first; v < here.last; ++v, read += job.step, write += W) *reinterpret_cast<Floats*>(write) = lanes(read);
      };
      zeros(here.first);
      here.left == 0 && here.right == kLanes ? fill(Between<kLanes, Stride>::whole) : fill(Between<kLanes, Stride>(here.left, here.right));
      zeros(job.height - here.last);
    }
    if (++phase == job.period) phase = 0, inside = job.inside;
  }
}

template <int Pieces>
void gather_with_stride(const StripJob& job) {
  job.stride == 1 ? gather_pieces<Pieces, 1>(job) : gather_pieces<Pieces, 2>(job);
}

void gather_strips(const StripJob& job) {
  if (job.count == 1) return gather_with_stride<1>(job);
  if (job.count == 2) return gather_with_stride<2>(job);
  gather_with_stride<4>(job);
}

void turn_pixels(const float* from, int64_t size, const int64_t* offsets, int64_t columns, int64_t pixels, float* to) {
  for (int64_t pixel = 0; pixel < pixels; pixel += W, from += W, size -= W, to += W * columns) {
    const int64_t valid = pixels - pixel < W ? pixels - pixel : W;
    int64_t column = 0;
    for (; column + W <= columns; column += W) {
      Vector v[W];
      for (int i = 0; i < W; ++i) {
        const int64_t at = offsets[column + i];
        v[i] = at + W <= size ? load(from + at) : load_part(from + at, valid);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i >= valid) break;
        store(to + i * columns + column, v[i]);
      }
    }
    for (; column < columns; ++column)
      for (int64_t i = 0; i < valid; ++i) to[i * columns + column] = from[offsets[column] + i];
  }
}

// What is read or written so many rows later, of an image that lies beyond the caches.
constexpr int64_t kRowsAhead = 4;
template <int Write>
__attribute__((always_inline)) inline void prefetch_segment(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += W) __builtin_prefetch(from + i, Write);
}

// `Clipped`: nothing but the bounds is left to be applied.
template <bool Clipped, bool Residual>
void finish_rows(const FinishJob& job) {
  const Vector low = splat(job.low), high = splat(job.high);
  const auto finished = [&](Vector v) { return Clipped ? clip(v, low, high) : activated(clip(v, low, high), job.activation); };
  const float* sums = job.sums;
  for (int64_t r = 0; r < job.rows; ++r, sums += job.sums_stride) {
    float* y = job.y + r * job.y_stride;
    const float* residual = Residual ? job.residual + r * job.y_stride : nullptr;
    const int64_t ahead = (job.rows - 1 - r < kRowsAhead ? job.rows - 1 - r : kRowsAhead) * job.y_stride;
    for (int64_t s = 0; s < job.count; ++s) {
      const Segment segment = job.segments[s];
      const float *from = sums + segment.from, *add = Residual ? residual + segment.to : nullptr;
      float* to = y + segment.to;
      if (job.afar) {
        if (Residual) prefetch_segment<0>(add + ahead, segment.count);
        prefetch_segment<1>(to + ahead, segment.count);
      }
      int64_t i = 0;
      for (; i + W <= segment.count; i += W) store(to + i, finished(Residual ? load(from + i) + load(add + i) : load(from + i)));
      const int64_t rest = segment.count - i;
      if (rest) store_part(to + i, finished(Residual ? load(from + i) + load_part(add + i, rest) : load(from + i)), rest);
    }
  }
}

void finish(const FinishJob& job) {
  if (!activates(job.activation)) return job.residual ? finish_rows<true, true>(job) : finish_rows<true, false>(job);
  return job.residual ? finish_rows<false, true>(job) : finish_rows<false, false>(job);
}
