// The compiler's own baseline: SSE2 on x86-64, NEON on 64-bit ARM.
#include "covariance/cpu_kernel.h"

namespace kore_fast {
extern const CovarianceKernels covariance_generic = {
    kernel<float, float, 16, 4>(),    kernel<double, double, 16, 2>(),
    kernel<BFloat16, float, 16, 4>(), kernel<BFloat16, float, 16, 4>(),
    kernel<Half, float, 16, 4>(),
};
}  // namespace kore_fast
