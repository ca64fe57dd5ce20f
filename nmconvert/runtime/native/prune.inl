// Magnitude pruning in place; part of kernels.inl. The n largest |w| of every group of m are kept, ties go to the lower index,
// and the sums of squares before and after come from the same pass, while the block is in the cache.

// How |w| is compared (as the integer that its bits are without the sign) and squared. Halves are exact in float: their
// bits, moved into place, are the value over 2^112, subnormals included.
struct Single {
  typedef int32_t Bits __attribute__((may_alias));
  static constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
  static double square(int32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return static_cast<double>(value) * value;
  }
};
struct Half {
  typedef int16_t Bits __attribute__((may_alias));
  static constexpr int16_t kMagnitude = 0x7fff, kInfinity = 0x7c00;
  static double square(int16_t bits) { return Single::square(static_cast<int32_t>(bits) << 13) * 0x1p224; }
};
struct Brain {
  typedef int16_t Bits __attribute__((may_alias));
  static constexpr int16_t kMagnitude = 0x7fff, kInfinity = 0x7f80;
  static double square(int16_t bits) { return Single::square(static_cast<int32_t>(bits) << 16); }
};
struct Double {
  typedef int64_t Bits __attribute__((may_alias));
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff, kInfinity = 0x7ff0000000000000;
  static double square(int64_t bits) {
    double value;
    __builtin_memcpy(&value, &bits, 8);
    return value * value;
  }
};

constexpr int kGroups = 64;  // groups side by side, so that a comparison runs along them

// |w| of kGroups groups of m (M, where it is known at compile time, else m_) → in `keep` all bits of the n largest of each.
template <int M, typename Bits>
void keep_of(const Bits (*size)[kGroups], Bits (*keep)[kGroups], int m_, int n) {
  const int m = M ? M : m_;
  for (int j = 0; j < m; ++j)
    for (int g = 0; g < kGroups; ++g) keep[j][g] = 0;
  for (int j = 1; j < m; ++j)
    for (int i = 0; i < j; ++i)
      for (int g = 0; g < kGroups; ++g) {
        const Bits earlier = size[i][g] >= size[j][g];
        keep[j][g] += earlier;
        keep[i][g] += 1 - earlier;
      }
  for (int j = 0; j < m; ++j)
    for (int g = 0; g < kGroups; ++g) keep[j][g] = -(keep[j][g] < n);  // until here its rank
}

template <typename Type>
struct Pruning {
  typename Type::Bits largest = 0;
  double total[8] = {}, kept[8] = {};  // sums for each lane

  // `groups` groups of m weights each; M is m where it is known at compile time, else 0.
  template <int M>
  void groups_of(typename Type::Bits* weights, int64_t groups, int m_, int n) {
    const int m = M ? M : m_;
    for (; groups >= kGroups; groups -= kGroups, weights += kGroups * m) tile<M>(weights, kGroups, m, n);
    if (groups) tile<M>(weights, static_cast<int>(groups), m, n);
  }

  template <int M>
  void tile(typename Type::Bits* weights, int groups, int m_, int n) {
    typedef typename Type::Bits Bits;
    const int m = M ? M : m_;
    Bits size[M ? M : 32][kGroups], keep[M ? M : 32][kGroups];
    if (groups < kGroups) __builtin_memset(size, 0, sizeof(size));
    for (int g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j) size[j][g] = weights[g * m + j] & Type::kMagnitude;
    for (int j = 0; j < m; ++j)
      for (int g = 0; g < kGroups; ++g) largest = size[j][g] > largest ? size[j][g] : largest;
    keep_of<M>(size, keep, m, n);
    for (int j = 0; j < m; ++j)
      for (int g = 0; g < kGroups; g += 8)
        for (int lane = 0; lane < 8; ++lane) {
          total[lane] += Type::square(size[j][g + lane]);
          kept[lane] += Type::square(size[j][g + lane] & keep[j][g + lane]);
        }
    for (int g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j) weights[g * m + j] &= keep[j][g];
  }

  void many(typename Type::Bits* weights, int64_t groups, int m, int n) {
    switch (m) {
      case 2: return groups_of<2>(weights, groups, m, n);
      case 4: return groups_of<4>(weights, groups, m, n);
      case 8: return groups_of<8>(weights, groups, m, n);
      case 16: return groups_of<16>(weights, groups, m, n);
      default: return groups_of<0>(weights, groups, m, n);
    }
  }
};

template <typename Type>
bool prune_rows(void* raw, int64_t rows, int64_t columns, int n, int m, double* energy) {
  Pruning<Type> pruning;
  auto* weights = static_cast<typename Type::Bits*>(raw);
  const int tail = static_cast<int>(columns % m);
  if (tail == 0) {
    pruning.many(weights, rows * (columns / m), m, n);
  } else {
    for (int64_t row = 0; row < rows; ++row, weights += columns) {
      pruning.many(weights, columns / m, m, n);
      pruning.template groups_of<0>(weights + columns - tail, 1, tail, n);
    }
  }
  energy[0] = energy[1] = 0;
  for (int lane = 0; lane < 8; ++lane) {
    energy[0] += pruning.total[lane];
    energy[1] += pruning.kept[lane];
  }
  return pruning.largest < Type::kInfinity;
}
