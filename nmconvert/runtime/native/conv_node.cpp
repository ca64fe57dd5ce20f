// Convolutions.
#include <algorithm>

#include "nodes.h"

namespace nmconvert {
namespace {

constexpr int64_t kMostPad = 1 << 20;

// `name` as one number for each spatial dimension, `otherwise` where it is left out.
Triple read_triple(const Info& info, const char* name, size_t rank, int64_t otherwise) {
  const std::vector<int64_t> values = info.integers(name);
  Triple triple{otherwise, otherwise, otherwise};
  if (values.empty()) return triple;
  if (values.size() != rank) throw InvalidNode(std::string(name) + " has " + std::to_string(values.size()) + " entries");
  for (size_t d = 0; d < rank; ++d) {
    if (values[d] < 1 || values[d] > kMostPad) throw InvalidNode(std::string(name) + " " + describe(values) + " is out of range");
    triple[3 - rank + d] = values[d];
  }
  for (size_t d = rank; d < 3; ++d) triple[2 - d] = 1;
  return triple;
}

ConvAttributes read_conv(const Info& info, const std::vector<int64_t>& shape) {
  if (shape.size() < 3 || shape.size() > 5) throw InvalidNode("a convolution weight of shape " + describe(shape) + " is not supported");
  const size_t rank = shape.size() - 2;
  ConvAttributes attributes;
  attributes.outputs = shape[0];
  attributes.inputs = shape[1];
  for (size_t d = 0; d < rank; ++d) attributes.kernel[3 - rank + d] = shape[2 + d];
  const std::vector<int64_t> kernel = info.integers("kernel_shape");
  if (!kernel.empty() && kernel != std::vector<int64_t>(shape.begin() + 2, shape.end()))
    throw InvalidNode("kernel_shape " + describe(kernel) + " is not that of the weight " + describe(shape));
  attributes.strides = read_triple(info, "strides", rank, 1);
  attributes.dilations = read_triple(info, "dilations", rank, 1);
  const std::vector<int64_t> pads = info.integers("pads");
  if (!pads.empty() && pads.size() != 2 * rank) throw InvalidNode("pads has " + std::to_string(pads.size()) + " entries");
  attributes.auto_pad = info.text("auto_pad", "NOTSET");
  if (attributes.auto_pad.empty()) attributes.auto_pad = "NOTSET";
  const std::string& mode = attributes.auto_pad;
  if (mode != "NOTSET" && mode != "VALID" && mode != "SAME_UPPER" && mode != "SAME_LOWER") throw InvalidNode("auto_pad is '" + mode + "'");
  for (size_t i = 0; i < pads.size(); ++i) {
    if (pads[i] < 0 || pads[i] > kMostPad) throw InvalidNode("pads " + describe(pads) + " are out of range");
    if (mode == "NOTSET") (i < rank ? attributes.before : attributes.after)[3 - rank + i % rank] = pads[i];
  }
  attributes.groups = info.integer("group", 1);
  if (attributes.groups < 1 || attributes.outputs % attributes.groups) throw InvalidNode("group is " + std::to_string(attributes.groups));
  return attributes;
}

template <typename Math>
class ConvNode final : public Call<Math> {
  using typename Call<Math>::Real;
  using Call<Math>::op_, Call<Math>::packed_, Call<Math>::epilogue_;

 public:
  ConvNode(const Operator& op, int compute, const Isa* isa, const Info& info)
      : Call<Math>(op, compute, info),
        attributes_(read_conv(info, packed_.shape)),
        math_(isa, packed_, rows_of(packed_.shape.size()), attributes_.groups, read_hint(info), 1.0f) {
    prepare(likely_input(info));
    math_.ready();
  }

  void run(const Context& context) override {
    Buffers<Real>& buffers = Buffers<Real>::mine();
    const Constant input = context.input(0);
    if (!fits(input.shape))
      throw InvalidNode("the input is " + describe(input.shape) + ", the weight " + describe(packed_.shape) + " takes " +
                        std::to_string(attributes_.groups * attributes_.inputs) + " channels");
    ConvAttributes attributes = attributes_;
    ImageOf<Real> image{};
    image.batch = input.shape[0];
    image.in = extent(input.shape);
    image.out = conv_output(attributes, image.in);
    std::vector<int64_t> out{image.batch, attributes_.outputs};
    out.insert(out.end(), image.out.begin() + 5 - input.shape.size(), image.out.end());

    image.x = reals<Real>(input, buffers.x);
    const Constant bias = context.input(op_.bias());
    image.bias = reals<Real>(bias, buffers.bias);
    if (image.bias && bias.shape != std::vector<int64_t>{attributes_.outputs}) throw InvalidNode("the bias is " + describe(bias.shape));
    image.residual = this->residual(context, out, buffers);
    Output<Real> output(context, out, this->compute_, buffers.y);
    image.y = output.reals();
    this->team_.run(context.parallel(this->team_), product(input.shape, 0, input.shape.size()),
                    [&](const Parallel& parallel) { math_.conv(packed_, attributes, image, epilogue_, parallel); });
    output.finish();
  }

 private:
  static std::vector<bool> rows_of(size_t rank) {
    std::vector<bool> rows(rank, false);
    rows[0] = true;
    return rows;
  }

  bool fits(const std::vector<int64_t>& input) const {
    return input.size() == packed_.shape.size() && input[1] == attributes_.groups * attributes_.inputs;
  }

  static Triple extent(const std::vector<int64_t>& input) {
    Triple in{1, 1, 1};
    std::copy(input.begin() + 2, input.end(), in.begin() + 5 - input.size());
    return in;
  }

  void prepare(const std::vector<int64_t>& input) {
    if (!fits(input) || product(input, 0, input.size()) == 0) return;
    math_.prepare_conv(packed_, attributes_, input[0], extent(input));
  }

  ConvAttributes attributes_;
  Math math_;
};

}  // namespace

std::unique_ptr<Node> make_conv_node(const Operator& op, int compute, const Isa* isa, const Info& info) {
  return make_for<ConvNode>(op, compute, isa, info);
}

}  // namespace nmconvert
