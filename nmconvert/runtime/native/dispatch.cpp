#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace nmconvert {
namespace {

bool supported([[maybe_unused]] const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
  return true;
}

}  // namespace

const Isa* select_isa() {
  const char* wanted = std::getenv("NMCONVERT_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  const Isa* automatic[] = {isa_avx512(), isa_avx2(), isa_neon()};  // portable loops would not be faster than dense
  const Isa* all[] = {automatic[0], automatic[1], automatic[2], isa_portable()};
  if (!wanted) {
    for (const Isa* isa : automatic)
      if (isa && supported(isa->name)) return isa;
    return nullptr;
  }
  for (const Isa* isa : all)
    if (isa && !std::strcmp(isa->name, wanted) && supported(isa->name)) return isa;
  return nullptr;
}

const Isa* narrower(const Isa* isa) { return isa->width == 16 ? isa_avx2() : nullptr; }

}  // namespace nmconvert
