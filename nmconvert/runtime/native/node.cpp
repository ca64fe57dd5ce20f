#include "node.h"

#include "nodes.h"

namespace nmconvert {

namespace {

constexpr struct {
  const char* name;
  Base base;
  bool residual;
  Activation activation;
} kFunctions[] = {
    {"Conv", Base::kConv, false, Activation::kNone},
    {"ConvRelu", Base::kConv, false, Activation::kClip},
    {"ConvClip", Base::kConv, false, Activation::kClip},
    {"ConvSilu", Base::kConv, false, Activation::kSilu},
    {"ConvAdd", Base::kConv, true, Activation::kNone},
    {"ConvAddRelu", Base::kConv, true, Activation::kClip},
    {"MatMul", Base::kMatMul, false, Activation::kNone},
    {"Linear", Base::kLinear, false, Activation::kNone},
    {"LinearRelu", Base::kLinear, false, Activation::kClip},
    {"LinearSilu", Base::kLinear, false, Activation::kSilu},
    {"LinearGelu", Base::kLinear, false, Activation::kGelu},
    {"LinearGeluTanh", Base::kLinear, false, Activation::kGeluTanh},
    {"LinearAdd", Base::kLinear, true, Activation::kNone},
    {"Gemm", Base::kGemm, false, Activation::kNone},
    {"GemmRelu", Base::kGemm, false, Activation::kClip},
};

}  // namespace

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = [] {
    std::vector<Operator> made;
    for (const bool scaled : {false, true})
      for (const auto& function : kFunctions)
        made.push_back({(scaled ? "Scaled" : "") + std::string(function.name), function.base, function.residual, function.activation, scaled});
    return made;
  }();
  return all;
}

std::unique_ptr<Node> make_node(const Operator& op, int compute, const Isa* isa, const Info& info) {
  return op.base == Base::kConv ? make_conv_node(op, compute, isa, info) : make_product_node(op, compute, isa, info);
}

}  // namespace nmconvert
