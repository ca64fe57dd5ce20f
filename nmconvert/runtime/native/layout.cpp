#include "layout.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>

#include "isa.h"

namespace nmconvert {
namespace {

// Of the L1 data cache three quarters at 2:4, the rest for the weights and the sums that stream by; all and more of it where fewer
// entries read the panel: ends of chunks then cost more than what is displaced.
int64_t panel_budget(double density) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  static const int64_t l1 = 0;
#endif
  const double share = std::clamp(1.25 - density, 0.75, 1.25);
  return static_cast<int64_t>(share * static_cast<double>(std::clamp<int64_t>(l1, 32 << 10, 64 << 10)));
}

// Bytes of the pages that a core knows the places of: AMD's say how many (64 on Zen 3, 72 on Zen 4), Intel's servers have 96.
int64_t mapped_at_once() {
  constexpr int64_t kPage = 4096;
  int64_t pages = 96;
#if defined(__x86_64__)
  static const unsigned of_amd = [] {
    unsigned eax, ebx = 0, ecx, edx;
    return __get_cpuid(0x80000005, &eax, &ebx, &ecx, &edx) ? ebx >> 16 & 0xff : 0;
  }();
  if (of_amd) pages = of_amd;
#endif
  return pages * kPage;
}

// The size of chunks that takes the fewest steps, of `channels` that keep `entries` each; a chunk costs a row one step more.
int64_t best_chunk(int64_t channels, double entries, int64_t unit, int64_t most) {
  most = std::clamp<int64_t>(most, 1, channels);
  if (unit > most) unit = 1;
  const auto steps = [&](int64_t count) { return std::ceil(static_cast<double>(count) * entries / kStep - 1e-9) + 1; };
  int64_t best = unit;
  double least = 0;
  for (int64_t size = unit; size <= most; size += unit) {
    const double cost = static_cast<double>(channels / size) * steps(size) + (channels % size ? steps(channels % size) : 0);
    if (least == 0 || cost <= least) least = cost, best = size;
  }
  return best;
}

void choose_chunk(Layout& layout, double density, Hint hint) {
  const int64_t bytes = layout.channel_lines * layout.height * layout.width * 4;
  const double entries = static_cast<double>(layout.columns) / static_cast<double>(layout.channels) * density;
  const int64_t reach = 0x10000 / (layout.channel_lines * layout.pitch);
  layout.chunk = best_chunk(layout.channels, entries, hint.m, std::min(panel_budget(density) / bytes, reach));
}

}  // namespace

Layout column_layout(int64_t columns, double density, Hint hint, int64_t vectors, int64_t width) {
  Layout layout;
  layout.columns = layout.channels = columns;
  layout.height = layout.pitch = vectors;
  layout.width = width;
  choose_chunk(layout, density, hint);
  return layout;
}

Layout in_place_layout(int64_t columns, double density, Hint hint, int64_t vectors, int64_t width, int64_t pitch) {
  Layout layout = column_layout(columns, density, hint, vectors, width);
  layout.pitch = pitch;
  choose_chunk(layout, density, hint);
  return layout;
}

Layout strip_layout(int64_t channels, const Kernel& kernel, double density, Hint hint, int64_t vectors, int64_t width) {
  Layout layout;
  layout.strips = true;
  layout.columns = channels * kernel.rows * kernel.columns;
  layout.channels = channels;
  layout.height = layout.pitch = vectors + (kernel.rows - 1) * kernel.dilation / kernel.stride;
  layout.width = width;
  layout.kernel = kernel;
  layout.channel_lines = kernel.columns * kernel.remainders();
  choose_chunk(layout, density, hint);
  return layout;
}

bool Layout::fits() const {
  constexpr int64_t kLine = 64, kSets = 64;  // bytes, lines: of any L1 cache of today
  if (chunk_lines() * pitch > 0x10000) return false;
  const int64_t bytes = pitch * width * 4;
  return !in_place() || (std::gcd(bytes, kLine * kSets) <= height * width * 4 && chunk_lines() * bytes <= mapped_at_once());
}

std::vector<Layout::Place> Layout::places(const std::vector<uint32_t>& order) const {
  std::vector<Place> places(order.size());
  std::vector<uint16_t> next(chunks());
  for (size_t column = 0; column < order.size(); ++column) {
    int64_t channel = static_cast<int64_t>(column), line = 0, down = 0;
    if (strips) {
      const int64_t x = order[column] % kernel.columns, y = order[column] / kernel.columns % kernel.rows * kernel.dilation;
      channel = order[column] / (kernel.columns * kernel.rows);
      line = y % kernel.stride / kernel.remainder_step() * kernel.columns + x;
      down = y / kernel.stride;
    }
    const int64_t at = (channel % chunk * channel_lines + line) * pitch + down;
    places[column] = {static_cast<uint32_t>(channel / chunk), static_cast<uint16_t>(at), next[channel / chunk]++};
  }
  return places;
}

}  // namespace nmconvert
