// AVX-512: 32 registers of 8 doubles, 24 of them accumulators.
#include "nullspace/cpu_kernel.h"

namespace kore_fast {
extern const PanelKernel panels_avx512 = panels<64, 8>();
}  // namespace kore_fast
