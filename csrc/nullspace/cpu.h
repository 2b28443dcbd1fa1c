// What the drivers (solve_cpu.cpp, product_cpu.cpp) ask of an instruction set (cpu_<set>.cpp).
#pragma once

#include <cstdint>

namespace kore_fast {

// The right side lies in panels, (depth, panel) row-major; of the left, strips of `strip` rows are packed as
// (depth, strip), so that both are read one after the other.
struct PanelKernel {
  int64_t panel;
  int64_t strip;
  // x (strip, panel) −= aᵀ b for a strip a (depth, strip) and b (depth, panel); only the first `columns` of each row.
  void (*subtract)(const double* a, const double* b, int64_t depth, int64_t columns, double* x);
  // x (strip, panel) ← L⁻¹ x for a strip's own lower triangle, packed like a strip, with inverted diagonal.
  void (*substitute)(const double* a, int64_t columns, double* x);
};

extern const PanelKernel panels_generic;
#if defined(KORE_FAST_X86)
extern const PanelKernel panels_avx2;
extern const PanelKernel panels_avx512;
#endif

}  // namespace kore_fast
