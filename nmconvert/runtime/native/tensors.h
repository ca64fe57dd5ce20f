// Inputs and outputs of a run as the numbers that a kernel computes with: 16-bit ones are widened before, narrowed after.
#pragma once

#include "elements.h"
#include "memory.h"
#include "node.h"
#include "shapes.h"

namespace nmconvert {

// `tensor` as Reals: itself, or widened into `buffer`.
template <typename Real>
const Real* reals(const Constant& tensor, Buffer<Real>& buffer) {
  if (!tensor.data || (tensor.type != ort::kFloat16 && tensor.type != ort::kBfloat16)) return static_cast<const Real*>(tensor.data);
  const int64_t size = tensor.size();
  const uint16_t* from = static_cast<const uint16_t*>(tensor.data);
  Real* to = buffer.at_least(size);
  const auto convert = tensor.type == ort::kFloat16 ? half_to_float : bfloat_to_float;
  for (int64_t i = 0; i < size; ++i) to[i] = convert(from[i]);
  return to;
}

// An output of element type `type`, written as Reals.
template <typename Real>
class Output {
 public:
  Output(const Context& context, const std::vector<int64_t>& shape, int type, Buffer<Real>& buffer)
      : data_(context.output(shape)), type_(type), size_(product(shape, 0, shape.size())), narrow_(type == ort::kFloat16 || type == ort::kBfloat16) {
    reals_ = narrow_ ? buffer.at_least(size_) : static_cast<Real*>(data_);
  }
  Real* reals() { return reals_; }
  void finish() {
    if (!narrow_) return;
    const auto convert = type_ == ort::kFloat16 ? float_to_half : float_to_bfloat;
    for (int64_t i = 0; i < size_; ++i) static_cast<uint16_t*>(data_)[i] = convert(static_cast<float>(reals_[i]));
  }

 private:
  void* data_;
  int type_;
  int64_t size_;
  bool narrow_;
  Real* reals_;
};

template <typename Real>
struct Buffers {
  Buffer<Real> x, turned, bias, residual, y, ready_bias, ready_residual;
  static Buffers& mine() {
    thread_local Buffers buffers;
    return buffers;
  }
};

}  // namespace nmconvert
