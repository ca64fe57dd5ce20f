#define NMC_NAMESPACE portable
#define NMC_WIDTH 4
#define NMC_NAME "portable"
#define NMC_REGISTERS 16
#define NMC_FACTORY isa_portable
#include "kernels.inl"
