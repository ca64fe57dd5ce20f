// What the library exports: RegisterCustomOps for onnxruntime, and a few plain functions for Python.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "node.h"

#ifndef NMCONVERT_VERSION
#define NMCONVERT_VERSION ""  // built by hand: taken to be of this source
#endif

namespace nmconvert {
namespace {

using ort::call;

constexpr int kTypes[] = {ort::kFloat, ort::kFloat16, ort::kBfloat16, ort::kDouble};

// The element types that the values of an operator may have.
std::vector<int> stored_types(const Operator& op) {
  return op.scaled ? std::vector<int>{ort::kInt8} : std::vector<int>(std::begin(kTypes), std::end(kTypes));
}

// One operator for one pair of types; onnxruntime chooses among those of the same name by the types of the inputs.
struct CustomOp : OrtCustomOp {
  const Operator* op;
  int compute, stored;
  const Isa* isa;
};

struct Kernel {
  const OrtApi* api;
  const char* name;
  std::unique_ptr<Node> node;
};

// Runs `body` and turns what it throws into a status.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const char* name, Body body) {
  const auto status = [&](int code, const char* message) {
    char text[512];
    std::snprintf(text, sizeof(text), "nmconvert.%s: %s", name, message);
    return call<OrtStatus*>(api, ort::kCreateStatus, code, static_cast<const char*>(text));
  };
  try {
    body();
    return nullptr;
  } catch (const InvalidNode& error) {
    return status(ort::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return status(ort::kFail, "out of memory");
  } catch (const std::exception& error) {
    return status(ort::kFail, error.what());
  }
}

const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

// The output may take the place of input `Residual` where nothing else reads that: kernels read each number before they write it.
template <int Residual>
size_t replace(int** inputs, int** outputs) {
  static int input = Residual, output = 0;
  *inputs = &input;
  *outputs = &output;
  return 1;
}

CustomOp make_custom_op(const Operator& op, int compute, int stored, const Isa* isa) {
  CustomOp custom{};
  custom.op = &op;
  custom.compute = compute;
  custom.stored = stored;
  custom.isa = isa;
  custom.version = ort::kCustomOpVersion;
  custom.GetName = [](const OrtCustomOp* it) { return self(it).op->name.c_str(); };
  custom.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  custom.GetInputTypeCount = [](const OrtCustomOp* it) { return self(it).op->inputs(); };
  custom.GetInputType = [](const OrtCustomOp* it, size_t index) {
    if (index == 2 || index == 3) return static_cast<int>(ort::kUint8);
    if (index == 4 && self(it).op->scaled) return static_cast<int>(ort::kFloat);
    return index == 1 ? self(it).stored : self(it).compute;
  };
  custom.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  custom.GetOutputType = [](const OrtCustomOp* it, size_t) { return self(it).compute; };
  custom.GetInputCharacteristic = [](const OrtCustomOp* it, size_t index) -> int {
    const Operator& function = *self(it).op;
    return function.base != Base::kMatMul && index == function.bias() ? ort::kOptional : ort::kRequired;
  };
  custom.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  custom.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  custom.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  custom.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  custom.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  custom.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  if (op.residual) {
    constexpr size_t (*kLast[])(int**, int**) = {replace<4>, replace<5>, replace<6>};
    custom.GetMayInplace = kLast[op.inputs() - 1 - 4];
    custom.ReleaseMayInplace = [](int*, int*) {};
  }
  custom.CreateKernelV2 = [](const OrtCustomOp* it, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    const CustomOp& custom_op = self(it);
    return guarded(api, custom_op.op->name.c_str(), [&] {
      *kernel = new Kernel{api, custom_op.op->name.c_str(), make_node(*custom_op.op, custom_op.compute, custom_op.isa, Info(api, info))};
    });
  };
  custom.KernelComputeV2 = [](void* raw, OrtKernelContext* context) {
    Kernel& kernel = *static_cast<Kernel*>(raw);
    return guarded(kernel.api, kernel.name, [&] { kernel.node->run(Context(kernel.api, context)); });
  };
  custom.KernelDestroy = [](void* raw) { delete static_cast<Kernel*>(raw); };
  return custom;
}

// The operators for `isa`; they live as long as the library, because sessions keep pointers to them.
std::vector<CustomOp>& custom_ops(const Isa* isa) {
  static std::map<const Isa*, std::vector<CustomOp>> made;
  std::vector<CustomOp>& ops = made[isa];
  if (ops.empty())
    for (const Operator& op : operators())
      for (int compute : kTypes)
        for (int stored : stored_types(op)) ops.push_back(make_custom_op(op, compute, stored, isa));
  return ops;
}

// Sets `domain` to that of these operators, in which they are put once for each onnxruntime in the process.
OrtStatus* find_domain(const OrtApi* api, const Isa* isa, OrtCustomOpDomain*& domain) {
  static std::mutex mutex;
  static std::map<std::pair<const OrtApi*, const Isa*>, OrtCustomOpDomain*> made;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& found = made[{api, isa}];
  if (!found) {
    OrtCustomOpDomain* fresh = nullptr;
    if (OrtStatus* status = call<OrtStatus*>(api, ort::kCreateCustomOpDomain, "nmconvert", &fresh)) return status;
    for (CustomOp& op : custom_ops(isa))
      if (OrtStatus* status = call<OrtStatus*>(api, ort::kCustomOpDomainAdd, fresh, static_cast<const OrtCustomOp*>(&op))) {
        call<void>(api, ort::kReleaseCustomOpDomain, fresh);
        return status;
      }
    found = fresh;
  }
  domain = found;
  return nullptr;
}

}  // namespace
}  // namespace nmconvert

extern "C" {

// The instruction set in use, or an empty string where this CPU is not supported.
__attribute__((visibility("default"))) const char* NmconvertIsa() {
  const nmconvert::Isa* isa = nmconvert::select_isa();
  return isa ? isa->name : "";
}

__attribute__((visibility("default"))) const char* NmconvertVersion() { return NMCONVERT_VERSION; }

// Magnitude pruning, for Python (see Isa::prune); `type` is an index into kTypes. 0: done, 1: not all finite, 2: cannot.
__attribute__((visibility("default"))) int NmconvertPrune(void* weights, int64_t rows, int64_t columns, int n, int m, int type,
                                                          double* energy) {
  const nmconvert::Isa* isa = nmconvert::select_isa();
  if (!isa || type < 0 || type >= 4 || n < 1 || m < n || m > 32) return 2;
  return isa->prune[type](weights, rows, columns, n, m, energy) ? 0 : 1;
}

// Training under a mask, for Python (see masking.inl); `type` is 0 for float, 1 for double. The caller has checked NmconvertIsa.
__attribute__((visibility("default"))) int64_t NmconvertRenewMask(const void* weights, uint8_t* mask, int64_t groups,
                                                                  int64_t spacing, int n, int m, int type) {
  return nmconvert::select_isa()->renew_mask[type](weights, mask, groups, spacing, n, m);
}

__attribute__((visibility("default"))) void NmconvertMasked(const void* weights, const uint8_t* mask, int64_t count, void* out,
                                                            int type) {
  nmconvert::select_isa()->masked[type](weights, mask, count, out);
}

__attribute__((visibility("default"))) void NmconvertAddPruned(const void* weights, const uint8_t* mask, int64_t count,
                                                               double factor, void* sum, int type) {
  nmconvert::select_isa()->add_pruned[type](weights, mask, count, factor, sum);
}

// What onnxruntime calls. On a CPU that is not supported it registers nothing: the bodies of the functions serve.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace nmconvert;
  int major = 0, minor = 0;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) return nullptr;  // older than the ABI that this library speaks: nothing can be registered, or even reported
  if (std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor) != 2 || major != 1 || minor < 20)
    return ort::call<OrtStatus*>(api, ort::kCreateStatus, static_cast<int>(ort::kFail),
                                 "nmconvert's kernels were tested with onnxruntime 1.20 to 1.x; run without them");
  const Isa* isa = select_isa();
  if (!isa) return nullptr;
  OrtStatus* status = nullptr;
  OrtStatus* failed = guarded(api, "register", [&] {
    OrtCustomOpDomain* domain = nullptr;
    status = find_domain(api, isa, domain);
    if (!status) status = call<OrtStatus*>(api, ort::kAddCustomOpDomain, options, domain);
  });
  return failed ? failed : status;
}

}  // extern "C"
