// Runs a compressed model on the native kernels from C or C++: what it takes is one call, RegisterCustomOpsLibrary.
//
//   g++ -std=c++17 -I onnxruntime/include run_model.cpp -L onnxruntime/lib -lonnxruntime -o run_model
//   ./run_model LIBRARY MODEL DIMENSION…
//
// Where a layer may be faster dense, give it the file that `nmconvert bench MODEL --tuned FILE` writes on the same kind of CPU:
// registering the library alone runs every packed layer on the kernels.
//
// LIBRARY is what `python -c "from nmconvert import runtime; print(runtime.library())"` prints. The model takes one float
// input of the DIMENSIONs, which is filled with ones; the start of its first output is printed.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: run_model LIBRARY MODEL DIMENSION…\n");
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(16);
  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  void* library = nullptr;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "run_model", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->RegisterCustomOpsLibrary(options, argv[1], &library));  // all it takes
  check(ort->CreateSession(env, argv[2], options, &session));

  std::vector<int64_t> shape;
  size_t size = 1;
  for (int i = 3; i < argc; ++i) {
    shape.push_back(std::atoll(argv[i]));
    size *= static_cast<size_t>(shape.back());
  }
  std::vector<float> x(size, 1.0f);
  OrtMemoryInfo* memory = nullptr;
  OrtValue* input = nullptr;
  OrtValue* output = nullptr;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, x.data(), size * sizeof(float), shape.data(), shape.size(),
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
  OrtAllocator* allocator = nullptr;
  char *input_name = nullptr, *output_name = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->SessionGetInputName(session, 0, allocator, &input_name));
  check(ort->SessionGetOutputName(session, 0, allocator, &output_name));
  check(ort->Run(session, nullptr, &input_name, &input, 1, &output_name, 1, &output));
  float* y = nullptr;
  OrtTensorTypeAndShapeInfo* described = nullptr;
  size_t count = 0;
  check(ort->GetTensorMutableData(output, reinterpret_cast<void**>(&y)));
  check(ort->GetTensorTypeAndShape(output, &described));
  check(ort->GetTensorShapeElementCount(described, &count));
  for (size_t i = 0; i < std::min<size_t>(count, 4); ++i) std::printf("%.6g\n", static_cast<double>(y[i]));
}
