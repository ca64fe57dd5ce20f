// Arithmetic and text of shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nmconvert {

inline std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// The product of dimensions [first, last).
inline int64_t product(const std::vector<int64_t>& shape, size_t first, size_t last) {
  int64_t size = 1;
  for (size_t i = first; i < last; ++i) size *= shape[i];
  return size;
}

}  // namespace nmconvert
