#if defined(__AVX2__) && defined(__FMA__)
#define NMC_NAMESPACE avx2
#define NMC_WIDTH 8
#define NMC_NAME "avx2"
#define NMC_REGISTERS 16
#define NMC_FACTORY isa_avx2
#include "kernels.inl"
#else
#include "isa.h"
const nmconvert::Isa* nmconvert::isa_avx2() { return nullptr; }
#endif
