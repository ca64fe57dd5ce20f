// What both kinds of node are made of, and the two that make them.
#pragma once

#include "arithmetic.h"
#include "tensors.h"

namespace nmconvert {

Packed read_packed(const Operator& op, const Info& info);
Hint read_hint(const Info& info);
Epilogue read_epilogue(const Operator& op, const Info& info);
// The activation's shape as far as the file says: an open first dimension, the batch, is taken for 1; empty where others are open.
std::vector<int64_t> likely_input(const Info& info);

// What a call of either kind holds.
template <typename Math>
class Call : public Node {
 protected:
  using Real = typename Math::Real;

  Call(const Operator& op, int compute, const Info& info)
      : op_(op), compute_(compute), packed_(read_packed(op, info)), epilogue_(read_epilogue(op, info)) {}

  // What is added to an output of the shape `out`; null where this operator adds nothing.
  const Real* residual(const Context& context, const std::vector<int64_t>& out, Buffers<Real>& buffers) const {
    if (!op_.residual) return nullptr;
    const Constant input = context.input(op_.inputs() - 1);
    if (input.shape != out) throw InvalidNode("the residual is " + describe(input.shape) + ", the output " + describe(out));
    return reals<Real>(input, buffers.residual);
  }

  const Operator& op_;
  int compute_;
  Packed packed_;
  Epilogue epilogue_;
  Team team_;
};

std::unique_ptr<Node> make_conv_node(const Operator& op, int compute, const Isa* isa, const Info& info);
std::unique_ptr<Node> make_product_node(const Operator& op, int compute, const Isa* isa, const Info& info);

// Node for `compute`: in doubles where the model asks for them.
template <template <typename> class Made>
std::unique_ptr<Node> make_for(const Operator& op, int compute, const Isa* isa, const Info& info) {
  if (compute == ort::kDouble) return std::make_unique<Made<DoubleMath>>(op, compute, isa, info);
  return std::make_unique<Made<FloatMath>>(op, compute, isa, info);
}

}  // namespace nmconvert
