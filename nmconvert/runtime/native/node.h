// Nodes: what onnxruntime creates from a call of one of our functions, and runs.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "matrix.h"
#include "ort_abi.h"
#include "parallel.h"

namespace nmconvert {

enum class Base { kConv, kMatMul, kLinear, kGemm };

// One function of nmconvert/export/functions.py.
struct Operator {
  std::string name;
  Base base;
  bool residual;  // the last input is added before the activation
  Activation activation;
  bool scaled = false;  // the values are int8, and the input after the table is the scale of every row

  size_t bias() const { return scaled ? 5 : 4; }  // its input, if there is one
  size_t inputs() const { return bias() + (base == Base::kMatMul ? 0 : 1) + (residual ? 1 : 0); }
};
const std::vector<Operator>& operators();

// An error that onnxruntime reported.
struct OrtError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Attributes and constant inputs, when the session is made. An attribute of another type than is asked for throws InvalidNode.
class Info {
 public:
  Info(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  int64_t integer(const char* name, int64_t otherwise) const;
  float real(const char* name, float otherwise) const;
  std::string text(const char* name, const char* otherwise) const;
  std::vector<int64_t> integers(const char* name) const;  // empty where there is no such attribute
  Constant constant(size_t input) const;
  // What the file says about an input's shape: -1 for an open dimension; empty where it says nothing.
  std::vector<int64_t> shape(size_t input) const;
  const OrtApi* api() const { return api_; }

 private:
  // Throws where there is such an attribute after all, of another type than `kind`.
  void check_absent(const char* name, const char* kind) const;

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// Inputs and outputs of a run.
class Context {
 public:
  Context(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}
  Constant input(size_t index) const;  // no data where the input is left out
  void* output(const std::vector<int64_t>& shape) const;
  // For a node that runs on `team`.
  Parallel parallel(Team& team) const;

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
};

class Node {
 public:
  virtual ~Node() = default;
  virtual void run(const Context& context) = 0;
};

// `compute` is the element type of the activations. Throws InvalidNode.
std::unique_ptr<Node> make_node(const Operator& op, int compute, const Isa* isa, const Info& info);

}  // namespace nmconvert
