// Which instruction set the CPU kernels use: the best that this CPU and its operating system offer, or what the
// environment variable KORE_FAST_CPU (generic, avx2, avx512, avx512_bf16) limits it to.
#pragma once

namespace kore_fast {

enum class CpuCapability { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

CpuCapability cpu_capability();
const char* cpu_capability_name();

}  // namespace kore_fast
