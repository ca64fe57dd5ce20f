// MatMul, Linear and Gemm with the weight on the right.
#include <algorithm>

#include "nodes.h"

namespace nmconvert {
namespace {

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
class ProductNode final : public Call<Math> {
  using typename Call<Math>::Real;
  using Call<Math>::op_, Call<Math>::packed_, Call<Math>::epilogue_;

 public:
  ProductNode(const Operator& op, int compute, const Isa* isa, const Info& info)
      : Call<Math>(op, compute, info),
        attributes_(read_product(op, info, packed_.shape)),
        k_(packed_.shape[packed_.shape.size() - (attributes_.transposes_w ? 1 : 2)]),
        n_(packed_.shape[packed_.shape.size() - (attributes_.transposes_w ? 2 : 1)]),
        math_(isa, packed_, rows_of(packed_.shape.size()), product(attributes_.batch, 0, attributes_.batch.size()), read_hint(info),
              attributes_.alpha) {
    prepare(likely_input(info));
    math_.ready();
  }

  void run(const Context& context) override {
    Buffers<Real>& buffers = Buffers<Real>::mine();
    const Constant input = context.input(0);
    const Real* x = reals<Real>(input, buffers.x);
    std::vector<int64_t> shape = input.shape;
    if (op_.base == Base::kGemm && shape.size() != 2)
      throw InvalidNode("the input is " + describe(shape) + ", a Gemm takes two dimensions");
    if (attributes_.transposes_x) x = transposed(x, shape, buffers.turned);
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
    std::vector<int64_t> named = out;
    if (vector) named.erase(named.end() - 2);
    add_inputs(context, out, named, job, buffers);
    Output<Real> output(context, named, this->compute_, buffers.y);
    job.y = output.reals();
    this->team_.run(context.parallel(this->team_), product(shape, 0, shape.size()), [&](const Parallel& parallel) {
      if (attributes_.batch.empty()) return math_.linear(packed_, 0, job, epilogue_, parallel);
      each_batch(batch, shape, [&](int64_t index, int64_t from, int64_t group) {
        TokensOf<Real> part = job;
        part.x = x + from * tokens * k_;
        part.y = output.reals() + index * tokens * n_;
        if (job.residual) part.residual = job.residual + index * tokens * n_;
        math_.linear(packed_, group, part, epilogue_, parallel);
      });
    });
    output.finish();
  }

 private:
  std::vector<bool> rows_of(size_t rank) const {
    std::vector<bool> rows(rank, true);
    rows[rank - (attributes_.transposes_w ? 1 : 2)] = false;
    return rows;
  }

  void prepare(std::vector<int64_t> input) {
    if (attributes_.transposes_x) std::reverse(input.begin(), input.end());
    if (input.empty() || input.back() != k_) return;
    const size_t rank = input.size(), first = attributes_.batch.empty() || rank < 2 ? 0 : rank - 2;
    if (const int64_t tokens = product(input, first, rank - 1)) math_.prepare_linear(packed_, tokens);
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
  // `named` is the output's shape as the graph has it: without the dimension that a vector was given.
  void add_inputs(const Context& context, const std::vector<int64_t>& out, const std::vector<int64_t>& named, TokensOf<Real>& job,
                  Buffers<Real>& buffers) const {
    if (op_.base != Base::kMatMul) {
      const Constant input = context.input(op_.bias());
      if (const Real* b = reals<Real>(input, buffers.bias)) add_bias(b, input.shape, out, job, buffers);
    }
    const Real* residual = this->residual(context, named, buffers);
    if (!residual) return;
    if (job.residual) {  // the bias was spread out, too
      const int64_t size = product(out, 0, out.size());
      Real* both = buffers.ready_residual.at_least(size);
      for (int64_t i = 0; i < size; ++i) both[i] += residual[i];
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
    const Real beta = static_cast<Real>(attributes_.beta);
    if (size == 1 || (size == n_ && shape.back() == n_)) {
      Real* to = buffers.ready_bias.at_least(n_);
      for (int64_t i = 0; i < n_; ++i) to[i] = beta * b[size == 1 ? 0 : i];
      job.bias = to;
      return;
    }
    const int64_t total = product(out, 0, out.size());
    Real* to = buffers.ready_residual.at_least(std::max<int64_t>(1, total));
    for (int64_t i = 0; i < total; ++i) {
      int64_t rest = i, at = 0, step = 1;
      for (size_t d = rank; d-- > 0;) {
        const int64_t extent = out[out.size() - rank + d];
        if (shape[d] > 1) at += rest % extent * step;
        step *= shape[d];
        rest /= extent;
      }
      to[i] = beta * b[at];
    }
    job.residual = to;
  }

  ProductAttributes attributes_;
  int64_t k_, n_;
  Math math_;
};

}  // namespace

std::unique_ptr<Node> make_product_node(const Operator& op, int compute, const Isa* isa, const Info& info) {
  return make_for<ProductNode>(op, compute, isa, info);
}

}  // namespace nmconvert
