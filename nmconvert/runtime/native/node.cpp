#include "node.h"

#include "nodes.h"

namespace nmconvert {

namespace {

constexpr struct {
  const char* name;
  Base base;
} kBases[] = {{"SparseConv", Base::kConv}, {"SparseMatMul", Base::kMatMul}, {"SparseLinear", Base::kLinear}, {"SparseGemm", Base::kGemm}};

// What is fused into a call.
constexpr struct {
  const char* name;
  bool residual;
  Activation activation;
} kTails[] = {
    {"", false, Activation::kNone},      {"Relu", false, Activation::kClip},         {"Clip", false, Activation::kClip},
    {"Silu", false, Activation::kSilu},  {"Gelu", false, Activation::kGelu},         {"GeluTanh", false, Activation::kGeluTanh},
    {"Add", true, Activation::kNone},    {"AddRelu", true, Activation::kClip},
};

}  // namespace

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = [] {
    std::vector<Operator> made;
    for (const bool scaled : {false, true})
      for (const auto& base : kBases)
        for (const auto& tail : kTails)
          made.push_back({(scaled ? "Scaled" : "") + std::string(base.name) + tail.name, base.base, tail.residual, tail.activation, scaled});
    return made;
  }();
  return all;
}

std::unique_ptr<Node> make_node(const Operator& op, int compute, const Isa* isa, const Info& info) {
  return op.base == Base::kConv ? make_conv_node(op, compute, isa, info) : make_product_node(op, compute, isa, info);
}

}  // namespace nmconvert
