#if defined(__AVX512F__)
#define NMC_NAMESPACE avx512
#define NMC_WIDTH 16
#define NMC_NAME "avx512"
#define NMC_REGISTERS 32
#define NMC_FACTORY isa_avx512
#include "kernels.inl"
#else
#include "isa.h"
const nmconvert::Isa* nmconvert::isa_avx512() { return nullptr; }
#endif
