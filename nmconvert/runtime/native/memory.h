// Aligned buffers, and the ones that a thread keeps from run to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "isa.h"

namespace nmconvert {

// Memory for `size` elements, with slack of 64 bytes or an element on either side; elements of a size that divides 64 start at a
// cache line. It grows and never shrinks; what it held is lost then.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  T* data() { return data_ + kSlack; }
  const T* data() const { return data_ + kSlack; }

  // At least `size` elements; zeros where memory is new.
  T* at_least(int64_t size) {
    if (0 <= size && size <= size_ && data_) return data();
    T* data = unset(size);
    std::memset(data, 0, size * sizeof(T));
    return data;
  }
  // New memory, in which only the slack is zeros.
  T* unset(int64_t size) {
    if (size < 0 || size > kMax) throw std::bad_alloc();
    std::free(data_);
    data_ = nullptr;
    const size_t bytes = ((size + 2 * kSlack) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, kSlack * sizeof(T));
    std::memset(data_ + kSlack + size, 0, bytes - (kSlack + size) * sizeof(T));
    size_ = size;
    return data();
  }

 private:
  static constexpr int64_t kSlack = 64 / sizeof(T) > 0 ? 64 / sizeof(T) : 1;
  static constexpr int64_t kMax = int64_t{1} << 36;

  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
};

// One set for each thread. `shared_*` belong to the thread that runs the node and are read by all; `own_*` to each task.
struct Scratch {
  Buffer<float> shared_input, shared_pixels, shared_tokens, shared_sums;
  Buffer<float> own_panel, own_sums;
  Buffer<int64_t> shared_offsets;
  Buffer<Segment> own_segments;
  Buffer<Inside> own_inside;
  // Of the matrix unit: inputs in digits, of tokens and of quads of channels; what their sums are multiplied by.
  Buffer<int8_t> shared_digits, own_unpacked;
  Buffer<uint32_t> own_quads, own_staged;
  Buffer<float> shared_scales;

  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
};

}  // namespace nmconvert
