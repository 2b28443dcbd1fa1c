// The compiler's own baseline: SSE2 on x86-64, NEON on 64-bit ARM.
#include "nullspace/cpu_kernel.h"

namespace kore_fast {
extern const PanelKernel panels_generic = panels<16, 4>();
}  // namespace kore_fast
