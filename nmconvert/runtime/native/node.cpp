#include "node.h"

#include <algorithm>
#include <cmath>

#include "conv.h"
#include "wide.h"

namespace nmconvert {

constexpr float kInfinity = __builtin_inff();

const Operator kOperators[] = {
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
const size_t kOperatorCount = sizeof(kOperators) / sizeof(kOperators[0]);

namespace {

Packed read_packed(const Info& info) {
  Packed packed{info.constant(1), info.constant(2), info.constant(3), info.integers("shape"), info.integers("permuted"),
                info.integers("perm"), info.integers("code_shape")};
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

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

int64_t product(const std::vector<int64_t>& shape, size_t first, size_t last) {
  int64_t size = 1;
  for (size_t i = first; i < last; ++i) size *= shape[i];
  return size;
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic: floats on the kernels, doubles on plain loops. 16-bit activations are widened and narrowed around the kernels.

class FloatMath {
 public:
  using Real = float;
  FloatMath(const Isa* isa, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint hint, float scale)
      : isa_(isa), weights_(packed, is_row, groups, hint, scale) {}

  void linear(const Packed& packed, int64_t group, const Tokens& tokens, const Epilogue& epilogue, const Parallel& parallel) {
    run_linear(isa_, weights_, packed, group, tokens, epilogue, parallel);
  }
  void conv(const Packed& packed, const ConvAttributes& attributes, const Image& image, const Epilogue& epilogue, const Parallel& parallel) {
    run_conv(isa_, weights_, packed, attributes, image, epilogue, parallel);
  }

 private:
  const Isa* isa_;
  Weights weights_;
};

class DoubleMath {
 public:
  using Real = double;
  DoubleMath(const Isa*, const Packed& packed, const std::vector<bool>& is_row, int64_t groups, Hint, float scale)
      : weights_(make_wide(packed, is_row, groups, scale)) {}

  void linear(const Packed&, int64_t group, const TokensOf<double>& tokens, const Epilogue& epilogue, const Parallel& parallel) {
    run_wide_linear(weights_, group, tokens, epilogue, parallel);
  }
  void conv(const Packed&, const ConvAttributes& attributes, const ImageOf<double>& image, const Epilogue& epilogue,
            const Parallel& parallel) {
    run_wide_conv(weights_, attributes, image, epilogue, parallel);
  }

 private:
  WideWeights weights_;
};

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
  Buffer<Real> x, bias, residual, y, ready_bias, ready_residual;
  static Buffers& mine() {
    thread_local Buffers buffers;
    return buffers;
  }
};

// The tensors of the weight, for the first run at a new size; read from the context only then would cost a branch everywhere.
Packed at_run(const Context& context, const Packed& described) {
  Packed packed = described;
  packed.values = context.input(1);
  packed.mask = context.input(2);
  packed.table = context.input(3);
  return packed;
}

// ---------------------------------------------------------------------------------------------------------------------
// MatMul, Linear and Gemm with the weight on the right.

struct ProductAttributes {
  bool transposes_x = false, transposes_w = false;
  float alpha = 1, beta = 1;
  std::vector<int64_t> batch;  // leading dimensions of the weight
};

ProductAttributes read_product(const Operator& op, const Info& info, const std::vector<int64_t>& shape) {
  ProductAttributes attributes;
  if (shape.size() < 2 || (op.base == Base::kGemm && shape.size() != 2)) throw InvalidNode("the weight's shape is " + describe(shape));
  if (op.base == Base::kGemm) {
    attributes.transposes_x = info.integer("transA", 0) != 0;
    attributes.transposes_w = info.integer("transB", 0) != 0;
    attributes.alpha = info.real("alpha", 1.0f);
    attributes.beta = info.real("beta", 1.0f);
  }
  attributes.batch.assign(shape.begin(), shape.end() - 2);
  return attributes;
}

template <typename Math>
class ProductNode final : public Node {
  using Real = typename Math::Real;

 public:
  ProductNode(const Operator& op, int compute, const Isa* isa, const Info& info)
      : op_(op),
        compute_(compute),
        packed_(read_packed(info)),
        attributes_(read_product(op, info, packed_.shape)),
        epilogue_(read_epilogue(op, info)),
        k_(packed_.shape[packed_.shape.size() - (attributes_.transposes_w ? 1 : 2)]),
        n_(packed_.shape[packed_.shape.size() - (attributes_.transposes_w ? 2 : 1)]),
        math_(isa, packed_, rows_of(packed_.shape.size()), product(attributes_.batch, 0, attributes_.batch.size()), read_hint(info),
              attributes_.alpha) {}

  void run(const Context& context) override {
    Buffers<Real>& buffers = Buffers<Real>::mine();
    const Packed packed = at_run(context, packed_);
    const Constant input = context.input(0);
    const Real* x = reals<Real>(input, buffers.x);
    std::vector<int64_t> shape = input.shape;
    if (attributes_.transposes_x && shape.size() == 2) x = transposed(x, shape, buffers.y);
    if (shape.empty() || shape.back() != k_)
      throw InvalidNode("the input is " + describe(shape) + ", the weight takes " + std::to_string(k_) + " in its last dimension");
    const bool vector = shape.size() == 1;
    if (vector) shape.insert(shape.begin(), 1);
    const int64_t tokens = attributes_.batch.empty() ? product(shape, 0, shape.size() - 1) : shape[shape.size() - 2];

    std::vector<int64_t> out(shape.begin(), shape.end() - 1);
    if (!attributes_.batch.empty()) out = broadcast(out);
    const std::vector<int64_t> batch(out.begin(), out.end() - 1);
    out.push_back(n_);
    TokensOf<Real> job{x, tokens, nullptr, nullptr, nullptr};
    add_inputs(context, out, job, buffers);
    std::vector<int64_t> named = out;
    if (vector) named.erase(named.end() - 2);
    Output<Real> output(context, named, compute_, buffers.y);
    job.y = output.reals();
    if (attributes_.batch.empty()) {
      math_.linear(packed, 0, job, epilogue_, context.parallel());
    } else {
      each_batch(batch, shape, [&](int64_t index, int64_t from, int64_t group) {
        TokensOf<Real> part = job;
        part.x = x + from * tokens * k_;
        part.y = output.reals() + index * tokens * n_;
        if (job.residual) part.residual = job.residual + index * tokens * n_;
        math_.linear(packed, group, part, epilogue_, context.parallel());
      });
    }
    output.finish();
  }

 private:
  std::vector<bool> rows_of(size_t rank) const {
    std::vector<bool> rows(rank, true);
    rows[rank - (attributes_.transposes_w ? 1 : 2)] = false;
    return rows;
  }

  // x [K, M] → [M, K], in `buffer`.
  const Real* transposed(const Real* x, std::vector<int64_t>& shape, Buffer<Real>& buffer) const {
    const int64_t k = shape[0], m = shape[1];
    Real* to = buffer.at_least(std::max<int64_t>(1, k * m));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < k; ++j) to[i * k + j] = x[j * m + i];
    shape = {m, k};
    return to;
  }

  // The output's dimensions before the last: the input's and the weight's batches, broadcast, and the tokens.
  std::vector<int64_t> broadcast(const std::vector<int64_t>& input) const {
    const int64_t tokens = input.back();
    std::vector<int64_t> left(input.begin(), input.end() - 1), right = attributes_.batch;
    const size_t rank = std::max(left.size(), right.size());
    left.insert(left.begin(), rank - left.size(), 1);
    right.insert(right.begin(), rank - right.size(), 1);
    for (size_t d = 0; d < rank; ++d) {
      if (left[d] != right[d] && left[d] != 1 && right[d] != 1)
        throw InvalidNode("batches " + describe(left) + " and " + describe(right) + " do not broadcast");
      left[d] = left[d] == 1 ? right[d] : left[d];
    }
    left.push_back(tokens);
    return left;
  }

  // visit(index, batch of the input, batch of the weight) for every batch of the output.
  template <typename Visit>
  void each_batch(const std::vector<int64_t>& batch, const std::vector<int64_t>& shape, Visit visit) const {
    const auto place = [&](const std::vector<int64_t>& dims, size_t count, int64_t index) {
      int64_t at = 0, step = 1;
      for (size_t d = batch.size(); d-- > 0; index /= batch[d]) {
        const size_t missing = batch.size() - count;
        if (d < missing) continue;
        const int64_t extent = dims[d - missing];
        if (extent > 1) at += index % batch[d] * step;
        step *= extent;
      }
      return at;
    };
    const int64_t count = product(batch, 0, batch.size());
    for (int64_t index = 0; index < count; ++index)
      visit(index, place(shape, shape.size() - 2, index), place(attributes_.batch, attributes_.batch.size(), index));
  }

  // Bias and residual: what is one value for each column is a bias, anything else is spread out to the output's shape.
  void add_inputs(const Context& context, const std::vector<int64_t>& out, TokensOf<Real>& job, Buffers<Real>& buffers) const {
    if (op_.base != Base::kMatMul) {
      const Constant input = context.input(4);
      if (const Real* b = reals<Real>(input, buffers.bias)) add_bias(b, input.shape, out, job, buffers);
    }
    if (!op_.residual) return;
    const Constant input = context.input(op_.inputs() - 1);
    const Real* residual = reals<Real>(input, buffers.residual);
    if (!residual || input.shape != out) throw InvalidNode("the residual is " + describe(input.shape) + ", the output " + describe(out));
    if (job.residual) {  // the bias was spread out, too
      Real* both = buffers.ready_residual.at_least(input.size());
      for (int64_t i = 0; i < input.size(); ++i) both[i] += residual[i];
    } else {
      job.residual = residual;
    }
  }

  void add_bias(const Real* b, const std::vector<int64_t>& shape, const std::vector<int64_t>& out, TokensOf<Real>& job,
                Buffers<Real>& buffers) const {
    const size_t rank = shape.size();
    const int64_t size = product(shape, 0, rank);
    if (rank && rank <= out.size() && size == n_ && shape.back() == n_ && attributes_.beta == 1) {
      job.bias = b;
      return;
    }
    if (rank > out.size()) throw InvalidNode("a bias of shape " + describe(shape) + " does not fit");
    for (size_t d = 0; d < rank; ++d)
      if (shape[d] != 1 && shape[d] != out[out.size() - rank + d])
        throw InvalidNode("a bias of shape " + describe(shape) + " does not fit an output of " + describe(out));
    const int64_t total = product(out, 0, out.size());
    const bool by_column = size == 1 || (size == n_ && shape.back() == n_);
    Real* to = (by_column ? buffers.ready_bias : buffers.ready_residual).at_least(std::max<int64_t>(1, by_column ? n_ : total));
    for (int64_t i = 0; i < (by_column ? n_ : total); ++i) {
      int64_t rest = i, at = 0, step = 1;
      for (size_t d = rank; d-- > 0;) {
        const int64_t extent = out[out.size() - rank + d];
        if (shape[d] > 1) at += rest % extent * step;
        step *= shape[d];
        rest /= extent;
      }
      to[i] = static_cast<Real>(attributes_.beta) * b[at];
    }
    (by_column ? job.bias : job.residual) = to;
  }

  const Operator& op_;
  int compute_;
  Packed packed_;
  ProductAttributes attributes_;
  Epilogue epilogue_;
  int64_t k_, n_;
  Math math_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions.

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
class ConvNode final : public Node {
  using Real = typename Math::Real;

 public:
  ConvNode(const Operator& op, int compute, const Isa* isa, const Info& info)
      : op_(op),
        compute_(compute),
        packed_(read_packed(info)),
        attributes_(read_conv(info, packed_.shape)),
        epilogue_(read_epilogue(op, info)),
        math_(isa, packed_, rows_of(packed_.shape.size()), attributes_.groups, read_hint(info), 1.0f) {}

  void run(const Context& context) override {
    Buffers<Real>& buffers = Buffers<Real>::mine();
    const Packed packed = at_run(context, packed_);
    const Constant input = context.input(0);
    const size_t rank = packed_.shape.size(), spatial = rank - 2;
    if (input.shape.size() != rank || input.shape[1] != attributes_.groups * attributes_.inputs)
      throw InvalidNode("the input is " + describe(input.shape) + ", the weight " + describe(packed_.shape) + " takes " +
                        std::to_string(attributes_.groups * attributes_.inputs) + " channels");
    ConvAttributes attributes = attributes_;
    ImageOf<Real> image{};
    image.batch = input.shape[0];
    image.in = {1, 1, 1};
    for (size_t d = 0; d < spatial; ++d) image.in[3 - spatial + d] = input.shape[2 + d];
    image.out = conv_output(attributes, image.in);
    std::vector<int64_t> out{image.batch, attributes_.outputs};
    out.insert(out.end(), image.out.begin() + 3 - spatial, image.out.end());

    image.x = reals<Real>(input, buffers.x);
    const Constant bias = context.input(4);
    image.bias = reals<Real>(bias, buffers.bias);
    if (image.bias && bias.shape != std::vector<int64_t>{attributes_.outputs}) throw InvalidNode("the bias is " + describe(bias.shape));
    if (op_.residual) {
      const Constant residual = context.input(5);
      image.residual = reals<Real>(residual, buffers.residual);
      if (!image.residual || residual.shape != out)
        throw InvalidNode("the residual is " + describe(residual.shape) + ", the output " + describe(out));
    }
    Output<Real> output(context, out, compute_, buffers.y);
    image.y = output.reals();
    math_.conv(packed, attributes, image, epilogue_, context.parallel());
    output.finish();
  }

 private:
  static std::vector<bool> rows_of(size_t rank) {
    std::vector<bool> rows(rank, false);
    rows[0] = true;
    return rows;
  }

  const Operator& op_;
  int compute_;
  Packed packed_;
  ConvAttributes attributes_;
  Epilogue epilogue_;
  Math math_;
};

template <typename Math>
std::unique_ptr<Node> make(const Operator& op, int compute, const Isa* isa, const Info& info) {
  if (op.base == Base::kConv) return std::make_unique<ConvNode<Math>>(op, compute, isa, info);
  return std::make_unique<ProductNode<Math>>(op, compute, isa, info);
}

}  // namespace

std::unique_ptr<Node> make_node(const Operator& op, int compute, const Isa* isa, const Info& info) {
  return compute == ort::kDouble ? make<DoubleMath>(op, compute, isa, info) : make<FloatMath>(op, compute, isa, info);
}

}  // namespace nmconvert
