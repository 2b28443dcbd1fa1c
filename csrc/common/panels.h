// Dense products on a CPU: what the drivers (product.h, nullspace/cpu_solve.cpp) ask of an instruction set
// (panels_<set>.cpp).
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace kore_fast {

// The right side lies in panels, (depth, panel) row-major; of the left, strips of `strip` rows are packed as
// (depth, strip), so that both are read one after the other.
template <typename T>
struct PanelKernel {
  int64_t panel;
  int64_t strip;
  // x (strip, panel) −= aᵀ b for a strip a (depth, strip) and b (depth, panel); only the first `columns` of each row.
  void (*subtract)(const T* a, const T* b, int64_t depth, int64_t columns, T* x);
  // x (strip, panel) ← L⁻¹ x for a strip's own lower triangle, packed like a strip, with inverted diagonal.
  void (*substitute)(const T* a, int64_t columns, T* x);
};

struct PanelKernels {
  PanelKernel<float> of_float;
  PanelKernel<double> of_double;
};

extern const PanelKernels panels_generic;
#if defined(KORE_FAST_X86)
extern const PanelKernels panels_avx2;
extern const PanelKernels panels_avx512;
#endif

inline const PanelKernels& panel_kernels() {
#if defined(KORE_FAST_X86)
  switch (cpu_capability()) {
    case CpuCapability::kAvx512Bf16:
    case CpuCapability::kAvx512: return panels_avx512;
    case CpuCapability::kAvx2: return panels_avx2;
    case CpuCapability::kGeneric: break;
  }
#endif
  return panels_generic;
}

template <typename T>
const PanelKernel<T>& panel_kernel();
template <>
inline const PanelKernel<float>& panel_kernel<float>() {
  return panel_kernels().of_float;
}
template <>
inline const PanelKernel<double>& panel_kernel<double>() {
  return panel_kernels().of_double;
}

}  // namespace kore_fast
