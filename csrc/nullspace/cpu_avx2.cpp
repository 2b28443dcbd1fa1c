// AVX2 with FMA: 16 registers of 4 doubles, 12 of them accumulators.
#include "nullspace/cpu_kernel.h"

namespace kore_fast {
extern const PanelKernel panels_avx2 = panels<32, 4>();
}  // namespace kore_fast
