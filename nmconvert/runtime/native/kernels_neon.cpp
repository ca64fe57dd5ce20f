#if defined(__aarch64__)
#define NMC_NAMESPACE neon
#define NMC_WIDTH 4
#define NMC_NAME "neon"
#define NMC_REGISTERS 32
#define NMC_FACTORY isa_neon
#include "kernels.inl"
#else
#include "isa.h"
const nmconvert::Isa* nmconvert::isa_neon() { return nullptr; }
#endif
