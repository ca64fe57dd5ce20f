// What SR-STE does at each step with a weight and its mask of one byte an entry; part of kernels.inl. A weight is read once for each.

// Entry j of group g of a block stands at block + j * spacing + g, with `spacing` groups to a block of m * spacing entries.
template <typename Type>
struct Masking {
  typedef typename Type::Bits Bits;

  const Bits* weights;
  uint8_t* mask;
  int64_t spacing;
  int64_t flips = 0;

  template <int M>
  void groups_of(int64_t groups, int m_, int n) {
    const int m = M ? M : m_;
    Bits size[M ? M : 32][kGroups] = {}, keep[M ? M : 32][kGroups];
    for (int64_t first = 0; first < groups; first += kGroups) {
      const int count = static_cast<int>(groups - first < kGroups ? groups - first : kGroups);
      if (spacing == 1) {
        read_consecutive<M>(first, count, m, size);
        keep_of<M>(size, keep, m, n);
        write_consecutive<M>(first, count, m, keep);
      } else {
        each_run(first, count, m, [&](int g, int64_t at, int run) {
          for (int j = 0; j < m; ++j)
            for (int i = 0; i < run; ++i) size[j][g + i] = weights[at + j * spacing + i] & Type::kMagnitude;
        });
        keep_of<M>(size, keep, m, n);
        each_run(first, count, m, [&](int g, int64_t at, int run) {
          for (int j = 0; j < m; ++j) replace(mask + at + j * spacing, keep[j] + g, run);
        });
      }
    }
  }

  template <int M>
  void read_consecutive(int64_t first, int count, int m_, Bits (*size)[kGroups]) {
    const int m = M ? M : m_;
    const Bits* from = weights + first * m;
    if (count == kGroups) {
      for (int g = 0; g < kGroups; ++g)
        for (int j = 0; j < m; ++j) size[j][g] = from[g * m + j] & Type::kMagnitude;
    } else {
      for (int g = 0; g < count; ++g)
        for (int j = 0; j < m; ++j) size[j][g] = from[g * m + j] & Type::kMagnitude;
    }
  }

  template <int M>
  void write_consecutive(int64_t first, int count, int m_, const Bits (*keep)[kGroups]) {
    const int m = M ? M : m_;
    Bits in_order[(M ? M : 32) * kGroups];
    for (int g = 0; g < kGroups; ++g)
      for (int j = 0; j < m; ++j) in_order[g * m + j] = keep[j][g];
    replace(mask + first * m, in_order, count * m);
  }

  // Calls run(place in the tile, place of entry 0 in memory, length) for each run of groups that are neighbours in memory.
  template <typename Run>
  void each_run(int64_t first, int count, int m, const Run& run) {
    int64_t block = first / spacing, within = first % spacing;
    for (int g = 0; g < count; ++block, within = 0) {
      const int length = static_cast<int>(spacing - within < count - g ? spacing - within : count - g);
      run(g, block * m * spacing + within, length);
      g += length;
    }
  }

  void replace(uint8_t* old, const Bits* keep, int count) {
    int changed = 0;
    for (int i = 0; i < count; ++i) {
      const uint8_t fresh = static_cast<uint8_t>(keep[i] & 1);
      changed += old[i] ^ fresh;
      old[i] = fresh;
    }
    flips += changed;
  }
};

// The mask of the n largest |w| of every m, in place; returns how many entries changed.
template <typename Type>
int64_t renew_mask(const void* weights, uint8_t* mask, int64_t groups, int64_t spacing, int n, int m) {
  Masking<Type> masking{static_cast<const typename Type::Bits*>(weights), mask, spacing};
  switch (m) {
    case 2: masking.template groups_of<2>(groups, m, n); break;
    case 4: masking.template groups_of<4>(groups, m, n); break;
    case 8: masking.template groups_of<8>(groups, m, n); break;
    case 16: masking.template groups_of<16>(groups, m, n); break;
    default: masking.template groups_of<0>(groups, m, n);
  }
  return masking.flips;
}

// out = mask ⊙ w.
template <typename Value>
void masked(const void* weights, const uint8_t* mask, int64_t count, void* out) {
  const auto* w = static_cast<const Value*>(weights);
  auto* product = static_cast<Value*>(out);
  for (int64_t i = 0; i < count; ++i) product[i] = w[i] * static_cast<Value>(mask[i]);
}

// sum += factor · (1 − mask) ⊙ w. `sum` may be the weights themselves.
template <typename Value>
void add_pruned(const void* weights, const uint8_t* mask, int64_t count, double factor_, void* sum_) {
  const auto* w = static_cast<const Value*>(weights);
  auto* sum = static_cast<Value*>(sum_);
  const auto factor = static_cast<Value>(factor_);
  // A product with 0 or 1 is exact, so that it does not matter which of the two a compiler makes one operation with the sum.
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * w[i] * static_cast<Value>(1 - mask[i]);
}
