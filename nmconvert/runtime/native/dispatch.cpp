#include <cstdlib>
#include <cstring>

#include "amx.h"
#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nmconvert {
namespace {

// Whether the CPU has a matrix unit, and Linux (from 5.16 on) lets this process use its registers: once asked, for good.
[[maybe_unused]] bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;  // of EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  asm("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  static const bool granted = (edx & kTiles) && (edx & kInt8) && __builtin_cpu_supports("avx512vbmi2") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool supported([[maybe_unused]] const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (!std::strncmp(name, "amx", 3)) return supported("avx512") && has_amx();
#endif
  return true;
}

}  // namespace

const Isa* select_isa() {
  const char* wanted = std::getenv("NMCONVERT_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  const Isa* automatic[] = {isa_amx(false), isa_avx512(), isa_avx2(), isa_neon()};  // portable loops would not be faster than dense
  const Isa* all[] = {automatic[0], automatic[1], automatic[2], automatic[3], isa_portable(), isa_amx(true)};
  if (!wanted) {
    for (const Isa* isa : automatic)
      if (isa && supported(isa->name)) return isa;
    return nullptr;
  }
  for (const Isa* isa : all)
    if (isa && !std::strcmp(isa->name, wanted) && supported(isa->name)) return isa;
  return nullptr;
}

const Isa* isa_amx(bool always) {
  if (!isa_avx512() || !amx_loops()) return nullptr;
  const auto made = [](const char* name, bool all) {
    Isa isa = *isa_avx512();
    isa.name = name;
    isa.amx = amx_loops();
    isa.always_amx = all;
    return isa;
  };
  static const Isa chosen = made("amx", false), forced = made("amx-always", true);
  return always ? &forced : &chosen;
}

const Isa* narrower(const Isa* isa) { return isa->width == 16 ? isa_avx2() : nullptr; }

}  // namespace nmconvert
