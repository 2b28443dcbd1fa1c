// AVX-512: 32 registers of 8 doubles, 24 of them accumulators.
#include "nullspace/cpu_kernel.h"

namespace kore_fast {
extern const TriangularKernel triangular_avx512 = triangular<64, 8>();
}  // namespace kore_fast
