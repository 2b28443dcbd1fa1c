// What the driver (cpu.cpp) asks of an instruction set (cpu_<set>.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/narrow.h"

namespace kore_fast {

enum class Type { kFloat, kDouble, kBFloat16, kHalf };

// Rows of x that are added: where each begins, in elements from base, and the factor √w of its values.
struct Rows {
  const void* base;
  const int64_t* offset;
  const double* factor;  // null: all one
  int64_t count;
  int64_t d;
  int64_t stride;  // elements between columns
};

struct CovarianceKernel {
  int64_t panel;    // columns in a packed panel
  int64_t depth;    // tokens whose products are summed before promotion to float64
  int64_t grain;    // tokens are packed in multiples of this many, the last ones zero
  size_t element;   // bytes of a packed value
  bool (*all_finite)(const void* row, int64_t stride, int64_t d);
  // out: (tokens, panel) packed values of columns [first, first + panel)
  void (*pack)(const Rows& rows, int64_t first, void* out);
  // sums: (panel, panel) float64, row-major, += aᵀ b over `tokens` packed tokens, in the first `rows` rows and, where
  // `diagonal`, up to the diagonal; what lies beyond is undefined
  void (*panels)(const void* a, const void* b, int64_t tokens, int64_t rows, bool diagonal, double* sums);
};

// Kernels of an instruction set for x of a type, with or without row factors.
struct CovarianceKernels {
  CovarianceKernel of_float, of_double, of_bfloat16, of_bfloat16_weighted, of_half;
};

extern const CovarianceKernels covariance_generic;
#if defined(KORE_FAST_X86)
extern const CovarianceKernels covariance_avx2;
extern const CovarianceKernels covariance_avx512;
extern const CovarianceKernels covariance_avx512_bf16;
#endif

}  // namespace kore_fast
