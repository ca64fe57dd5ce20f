// Attributes and constants of a call, checked.
#include "nodes.h"

namespace nmconvert {

constexpr float kInfinity = __builtin_inff();

Packed read_packed(const Operator& op, const Info& info) {
  Packed packed{info.constant(1), info.constant(2), info.constant(3), op.scaled ? info.constant(4) : Constant{}, info.integers("shape"),
                info.integers("permuted"), info.integers("perm"), info.integers("code_shape")};
  checked_size(packed.shape, "shape");
  if (packed.mask.type != ort::kUint8 || packed.table.type != ort::kUint8) throw InvalidNode("mask and table have to be uint8");
  return packed;
}

Hint read_hint(const Info& info) {
  const Hint hint{info.integer("n", 1), info.integer("m", 1)};
  if (hint.n < 1 || hint.n > hint.m || hint.m > 1024) throw InvalidNode("the pattern is out of range");
  return hint;
}

Epilogue read_epilogue(const Operator& op, const Info& info) {
  Epilogue epilogue{op.activation, -kInfinity, kInfinity};
  if (op.activation == Activation::kClip) {
    epilogue.low = info.real("low", 0.0f);
    epilogue.high = info.real("high", kInfinity);
  }
  return epilogue;
}

std::vector<int64_t> likely_input(const Info& info) {
  std::vector<int64_t> shape = info.shape(0);
  if (!shape.empty() && shape[0] < 0) shape[0] = 1;
  double size = 1;
  for (int64_t dimension : shape) {
    if (dimension < 0) return {};
    size *= static_cast<double>(dimension);
  }
  return size > 1e11 ? std::vector<int64_t>{} : shape;
}

}  // namespace nmconvert
