// The compiler's own baseline: SSE2 on x86-64, NEON on 64-bit ARM.
#include "common/panels_kernel.h"

namespace kore_fast {
extern const PanelKernels panels_generic = {panels<float, 16, 4>(), panels<double, 16, 4>()};
}  // namespace kore_fast
