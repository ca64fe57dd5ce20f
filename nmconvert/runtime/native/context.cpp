#include "node.h"

namespace nmconvert {
namespace {

using ort::call;

// Throws what `status` says, if anything.
void check(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  const std::string message = call<const char*>(api, ort::kGetErrorMessage, static_cast<const OrtStatus*>(status));
  call<void>(api, ort::kReleaseStatus, status);
  throw OrtError(message);
}

// Whether the call succeeded: an attribute that is left out is not an error.
bool succeeded(const OrtApi* api, OrtStatus* status) {
  if (status) call<void>(api, ort::kReleaseStatus, status);
  return !status;
}

Constant describe(const OrtApi* api, const OrtValue* value) {
  Constant tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, call<OrtStatus*>(api, ort::kGetTensorTypeAndShape, value, &info));
  size_t rank = 0;
  OrtStatus* status = call<OrtStatus*>(api, ort::kGetTensorElementType, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &tensor.type);
  if (!status) status = call<OrtStatus*>(api, ort::kGetDimensionsCount, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &rank);
  if (!status) {
    tensor.shape.resize(rank);
    status = call<OrtStatus*>(api, ort::kGetDimensions, static_cast<const OrtTensorTypeAndShapeInfo*>(info), tensor.shape.data(), rank);
  }
  call<void>(api, ort::kReleaseTensorTypeAndShapeInfo, info);
  check(api, status);
  void* data = nullptr;
  check(api, call<OrtStatus*>(api, ort::kGetTensorMutableData, const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

}  // namespace

void Info::check_absent(const char* name, const char* kind) const {
  int64_t integer;
  float real;
  size_t size = 0;
  const auto there = [&](ort::Slot slot, auto... to) { return succeeded(api_, call<OrtStatus*>(api_, slot, info_, name, to...)); };
  if (there(ort::kKernelInfoGetAttributeInt64, &integer) || there(ort::kKernelInfoGetAttributeFloat, &real) ||
      there(ort::kKernelInfoGetAttributeString, static_cast<char*>(nullptr), &size) ||
      (there(ort::kKernelInfoGetAttributeArrayInt64, static_cast<int64_t*>(nullptr), &size) && size) ||
      (there(ort::kKernelInfoGetAttributeArrayFloat, static_cast<float*>(nullptr), &size) && size))
    throw InvalidNode(std::string(name) + " has to be " + kind);
}

int64_t Info::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  if (succeeded(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeInt64, info_, name, &value))) return value;
  check_absent(name, "an integer");
  return otherwise;
}

float Info::real(const char* name, float otherwise) const {
  float value = 0;
  if (succeeded(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeFloat, info_, name, &value))) return value;
  check_absent(name, "a number");
  return otherwise;
}

std::string Info::text(const char* name, const char* otherwise) const {
  size_t size = 0;
  if (!succeeded(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeString, info_, name, static_cast<char*>(nullptr), &size))) {
    check_absent(name, "a text");
    return otherwise;
  }
  if (!size) return otherwise;
  std::string value(size, '\0');
  check(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeString, info_, name, value.data(), &size));
  value.resize(size - 1);  // its size counts the final zero
  return value;
}

std::vector<int64_t> Info::integers(const char* name) const {
  size_t size = 0;  // stays so for what is no list of integers
  const bool found =
      succeeded(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeArrayInt64, info_, name, static_cast<int64_t*>(nullptr), &size));
  if (!found || !size) {
    check_absent(name, "a list of integers");
    return {};
  }
  std::vector<int64_t> values(size);
  check(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetAttributeArrayInt64, info_, name, values.data(), &size));
  return values;
}

Constant Info::constant(size_t input) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetConstantInputTensor, info_, input, &is_constant, &value));
  if (!is_constant || !value) throw InvalidNode("values, mask, table and scale have to be constants of the file");
  return describe(api_, value);
}

std::vector<int64_t> Info::shape(size_t input) const {
  OrtTypeInfo* type = nullptr;
  if (!succeeded(api_, call<OrtStatus*>(api_, ort::kKernelInfoGetInputTypeInfo, info_, input, &type))) return {};
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t rank = 0;
  std::vector<int64_t> shape;
  bool known = succeeded(api_, call<OrtStatus*>(api_, ort::kCastTypeInfoToTensorInfo, static_cast<const OrtTypeInfo*>(type), &info)) && info &&
               succeeded(api_, call<OrtStatus*>(api_, ort::kGetDimensionsCount, info, &rank));
  if (known) {
    shape.resize(rank);
    known = succeeded(api_, call<OrtStatus*>(api_, ort::kGetDimensions, info, shape.data(), rank));
  }
  call<void>(api_, ort::kReleaseTypeInfo, type);
  return known ? shape : std::vector<int64_t>{};
}

Constant Context::input(size_t index) const {
  size_t count = 0;
  check(api_, call<OrtStatus*>(api_, ort::kKernelContextGetInputCount, static_cast<const OrtKernelContext*>(context_), &count));
  if (index >= count) return {};
  const OrtValue* value = nullptr;
  check(api_, call<OrtStatus*>(api_, ort::kKernelContextGetInput, static_cast<const OrtKernelContext*>(context_), index, &value));
  return value ? describe(api_, value) : Constant{};
}

void* Context::output(const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  check(api_, call<OrtStatus*>(api_, ort::kKernelContextGetOutput, context_, size_t{0}, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api_, call<OrtStatus*>(api_, ort::kGetTensorMutableData, value, &data));
  return data;
}

Parallel Context::parallel(Team& team) const {
  const Parallel::Loop loop = [](void* raw, Parallel::Body body, size_t count, void* data) {
    const Context& self = *static_cast<const Context*>(raw);
    check(self.api_, call<OrtStatus*>(self.api_, ort::kKernelContextParallelFor, static_cast<const OrtKernelContext*>(self.context_), body,
                                      count, size_t{0}, data));
  };
  Context* self = const_cast<Context*>(this);
  team.meet(Parallel(loop, self, 1));
  return Parallel(loop, self, team.size());
}

}  // namespace nmconvert
