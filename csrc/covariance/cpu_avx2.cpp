// AVX2 with FMA: 16 registers of 8 floats, 12 of them accumulators.
#include "covariance/cpu_kernel.h"

namespace kore_fast {
extern const CovarianceKernels covariance_avx2 = {
    kernel<float, float, 32, 4>(),    kernel<double, double, 32, 4>(),
    kernel<BFloat16, float, 32, 4>(), kernel<BFloat16, float, 32, 4>(),
    kernel<Half, float, 32, 4>(),
};
}  // namespace kore_fast
