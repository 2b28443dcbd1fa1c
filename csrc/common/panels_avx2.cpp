// AVX2 with FMA: 16 registers, 12 of them accumulators.
#include "common/panels_kernel.h"

namespace kore_fast {
extern const PanelKernels panels_avx2 = {panels<float, 32, 4>(), panels<double, 32, 4>()};
}  // namespace kore_fast
