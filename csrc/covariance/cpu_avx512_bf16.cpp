// AVX-512 with bfloat16 dot products: two tokens an instruction, their exact products summed in float32.
#include <immintrin.h>

#include "covariance/cpu_kernel.h"

namespace kore_fast {
namespace {

constexpr int kWidth = 16, kPanel = 3 * kWidth, kRows = 8;

// As pack(), but pairs of tokens lie side by side: (tokens / 2, P, 2). A last odd token is paired with zeros.
void pack_pairs(const Rows& rows, int64_t first, void* out) {
  uint32_t* to = static_cast<uint32_t*>(out);
  const int64_t width = rows.d - first < kPanel ? rows.d - first : kPanel;
  for (int64_t k = 0; k < rows.count; k += 2, to += kPanel) {
    const uint16_t* base = static_cast<const uint16_t*>(rows.base) + first * rows.stride;
    const uint16_t* even = base + rows.offset[k];
    const bool paired = k + 1 < rows.count;
    const uint16_t* odd = base + rows.offset[paired ? k + 1 : k];
    const uint32_t kept = paired ? 0xffff0000u : 0u;
    if (rows.stride == 1 && width == kPanel) {
      for (int c = 0; c < kPanel; ++c) to[c] = even[c] | ((static_cast<uint32_t>(odd[c]) << 16) & kept);
    } else {
      for (int64_t c = 0; c < width; ++c)
        to[c] = even[c * rows.stride] | ((static_cast<uint32_t>(odd[c * rows.stride]) << 16) & kept);
      for (int64_t c = width; c < kPanel; ++c) to[c] = 0;
    }
  }
}

template <int NV>
void micro_pairs(const uint32_t* a, const uint32_t* b, int64_t tokens, double* sums) {
  __m512 acc[kRows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < tokens; k += 2, a += kPanel, b += kPanel) {
    __m512bh right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      for (int half = 0; half < 2; ++half) {
        double* at = sums + r * kPanel + v * kWidth + half * 8;
        const __m256 part = half ? _mm512_extractf32x8_ps(acc[r][v], 1) : _mm512_castps512_ps256(acc[r][v]);
        _mm512_storeu_pd(at, _mm512_add_pd(_mm512_loadu_pd(at), _mm512_cvtps_pd(part)));
      }
}

void panels_pairs(const void* a_, const void* b_, int64_t tokens, int64_t rows, bool diagonal, double* sums) {
  const uint32_t* a = static_cast<const uint32_t*>(a_);
  const uint32_t* b = static_cast<const uint32_t*>(b_);
  for_micro_tiles<kRows, kWidth>(
      rows, diagonal, [&](int64_t m) { micro_pairs<1>(a + m, b, tokens, sums + m * kPanel); },
      [&](int64_t m) { micro_pairs<2>(a + m, b, tokens, sums + m * kPanel); },
      [&](int64_t m) { micro_pairs<3>(a + m, b, tokens, sums + m * kPanel); });
}

}  // namespace

extern const CovarianceKernels covariance_avx512_bf16 = {
    kernel<float, float, 64, 8>(),
    kernel<double, double, 64, 8>(),
    {kPanel, kDepth, 2, sizeof(uint16_t), all_finite<BFloat16>, pack_pairs, panels_pairs},
    kernel<BFloat16, float, 64, 8>(),
    kernel<Half, float, 64, 8>(),
};

}  // namespace kore_fast
