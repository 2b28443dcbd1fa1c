// AVX-512: 32 registers of 16 floats, 24 of them accumulators.
#include "covariance/cpu_kernel.h"

namespace kore_fast {
extern const CovarianceKernels covariance_avx512 = {
    kernel<float, float, 64, 8>(),    kernel<double, double, 64, 8>(),
    kernel<BFloat16, float, 64, 8>(), kernel<BFloat16, float, 64, 8>(),
    kernel<Half, float, 64, 8>(),
};
}  // namespace kore_fast
