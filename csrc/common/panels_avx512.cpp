// AVX-512: 32 registers, 24 of them accumulators.
#include "common/panels_kernel.h"

namespace kore_fast {
extern const PanelKernels panels_avx512 = {panels<float, 64, 8>(), panels<double, 64, 8>()};
}  // namespace kore_fast
