// The arithmetic of C += XᵀX on a CPU, written once with vector types and compiled once per instruction set.
//
// Columns are packed into panels of P = 3 vectors, rows (tokens) one after the other. A micro-tile takes MR columns of
// one panel against all P of another (fewer on the diagonal) and keeps 3·MR accumulators in registers over kDepth
// tokens; then they are promoted to float64. Rounding of the narrow type acts on sums of kDepth products only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vector.h"
#include "covariance/cpu.h"

namespace kore_fast {
namespace {  // each instruction set gets its own copy: the linker must not merge them

constexpr int kDepth = 128;

template <typename X>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type exponent = 0x7f800000u;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type exponent = 0x7ff0000000000000ull;
};
template <>
struct Bits<BFloat16> {
  using type = uint16_t;
  static constexpr type exponent = 0x7f80;
};
template <>
struct Bits<Half> {
  using type = uint16_t;
  static constexpr type exponent = 0x7c00;
};

// Whether every value of a row is finite: no exponent of all ones.
template <typename X>
bool all_finite(const void* row, int64_t stride, int64_t d) {
  using B = typename Bits<X>::type;
  const char* at = static_cast<const char*>(row);
  B broken = 0;
  if (stride == 1) {
    for (int64_t c = 0; c < d; ++c) {
      B bits;
      std::memcpy(&bits, at + c * sizeof(X), sizeof bits);
      broken |= static_cast<B>((bits & Bits<X>::exponent) == Bits<X>::exponent);
    }
  } else {
    for (int64_t c = 0; c < d; ++c) {
      B bits;
      std::memcpy(&bits, at + c * stride * sizeof(X), sizeof bits);
      broken |= static_cast<B>((bits & Bits<X>::exponent) == Bits<X>::exponent);
    }
  }
  return broken == 0;
}

// Panel of columns [first, first + P) of the rows, times each row's factor, as (tokens, P); columns past d are zero.
template <typename X, typename T, int P>
void pack(const Rows& rows, int64_t first, void* out) {
  T* to = static_cast<T*>(out);
  const int64_t width = rows.d - first < P ? rows.d - first : P;
  for (int64_t k = 0; k < rows.count; ++k, to += P) {
    const X* from = static_cast<const X*>(rows.base) + rows.offset[k] + first * rows.stride;
    if (rows.stride == 1 && width == P) {
      for (int c = 0; c < P; ++c) to[c] = widen(from[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = widen(from[c * rows.stride]);
      for (int64_t c = width; c < P; ++c) to[c] = 0;
    }
    if (rows.factor != nullptr) {
      const T factor = static_cast<T>(rows.factor[k]);
      for (int c = 0; c < P; ++c) to[c] *= factor;
    }
  }
}

// sums[r][c] (MR rows, P apart, of float64) += Σ_k a[k][r] · b[k][c] for the first NV vectors of c, over at most kDepth
// tokens.
template <typename T, int BYTES, int P, int MR, int NV>
inline void micro(const T* a, const T* b, int64_t tokens, double* sums) {
  using V = typename VectorOf<T, BYTES>::type;
  constexpr int W = BYTES / sizeof(T);
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  for (int64_t k = 0; k < tokens; ++k, a += P, b += P) {
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = *reinterpret_cast<const V*>(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * right[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      for (int c = 0; c < W; ++c) sums[r * P + v * W + c] += static_cast<double>(acc[r][v][c]);
}

// The micro-tiles of a panel: MR rows at a time, and of three vectors those that lie below the diagonal somewhere.
template <int MR, int W, typename One, typename Two, typename Three>
inline void for_micro_tiles(int64_t rows, bool diagonal, One one, Two two, Three three) {
  for (int64_t m = 0; m < rows; m += MR) {
    const int64_t vectors = diagonal ? (m + MR - 1) / W + 1 : 3;
    if (vectors == 1)
      one(m);
    else if (vectors == 2)
      two(m);
    else
      three(m);
  }
}

template <typename T, int BYTES, int MR>
void panels(const void* a_, const void* b_, int64_t tokens, int64_t rows, bool diagonal, double* sums) {
  constexpr int W = BYTES / sizeof(T), P = 3 * W;
  static_assert(P % MR == 0);
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  for_micro_tiles<MR, W>(
      rows, diagonal, [&](int64_t m) { micro<T, BYTES, P, MR, 1>(a + m, b, tokens, sums + m * P); },
      [&](int64_t m) { micro<T, BYTES, P, MR, 2>(a + m, b, tokens, sums + m * P); },
      [&](int64_t m) { micro<T, BYTES, P, MR, 3>(a + m, b, tokens, sums + m * P); });
}

template <typename X, typename T, int BYTES, int MR>
constexpr CovarianceKernel kernel() {
  constexpr int P = 3 * (BYTES / sizeof(T));
  return {P, kDepth, 1, sizeof(T), all_finite<X>, pack<X, T, P>, panels<T, BYTES, MR>};
}

}  // namespace
}  // namespace kore_fast
