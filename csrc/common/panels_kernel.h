// The arithmetic of dense products and triangular solves on a CPU, written once with vector types and compiled once per instruction set.
// As for covariances: a panel is three vectors wide, a strip's products with it stay in registers.
#pragma once

#include "common/panels.h"
#include "common/vector.h"

namespace kore_fast {
namespace {  // each instruction set gets its own copy: the linker must not merge them

template <typename T, int BYTES, int STRIP, int NV>
inline void subtract_vectors(const T* a, const T* b, int64_t depth, T* x) {
  using V = typename VectorOf<T, BYTES>::type;
  constexpr int W = BYTES / sizeof(T), P = 3 * W;
  V acc[STRIP][NV];
#pragma GCC unroll 16
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  for (int64_t k = 0; k < depth; ++k, a += STRIP, b += P) {
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = *reinterpret_cast<const V*>(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * right[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(x + r * P + v * W) -= acc[r][v];
}

template <typename T, int BYTES, int STRIP>
void subtract(const T* a, const T* b, int64_t depth, int64_t columns, T* x) {
  constexpr int W = BYTES / sizeof(T);
  if (columns <= W)
    subtract_vectors<T, BYTES, STRIP, 1>(a, b, depth, x);
  else if (columns <= 2 * W)
    subtract_vectors<T, BYTES, STRIP, 2>(a, b, depth, x);
  else
    subtract_vectors<T, BYTES, STRIP, 3>(a, b, depth, x);
}

template <typename T, int BYTES, int STRIP>
void substitute(const T* a, int64_t columns, T* x) {
  using V = typename VectorOf<T, BYTES>::type;
  constexpr int W = BYTES / sizeof(T), P = 3 * W;
  for (int64_t c = 0; c < columns; c += W) {
    V row[STRIP];
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; ++r) row[r] = *reinterpret_cast<const V*>(x + r * P + c);
#pragma GCC unroll 16
    for (int k = 0; k < STRIP; ++k) {
      row[k] *= a[k * STRIP + k];
#pragma GCC unroll 16
      for (int r = k + 1; r < STRIP; ++r) row[r] -= a[k * STRIP + r] * row[k];
    }
#pragma GCC unroll 16
    for (int r = 0; r < STRIP; ++r) *reinterpret_cast<V*>(x + r * P + c) = row[r];
  }
}

template <typename T, int BYTES, int STRIP>
constexpr PanelKernel<T> panels() {
  return {3 * (BYTES / static_cast<int64_t>(sizeof(T))), STRIP, subtract<T, BYTES, STRIP>, substitute<T, BYTES, STRIP>};
}

}  // namespace
}  // namespace kore_fast
