#include "common/cpu_capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace kore_fast {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

CpuCapability detect() {
#if defined(KORE_FAST_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuCapability::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
    return CpuCapability::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuCapability::kAvx512Bf16 : CpuCapability::kAvx512;
#else
  return CpuCapability::kGeneric;
#endif
}

CpuCapability limited() {
  const CpuCapability best = detect();
  if (const char* wanted = std::getenv("KORE_FAST_CPU"))
    for (int i = 0; i < 4; ++i)
      if (std::strcmp(wanted, kNames[i]) == 0) return std::min(best, static_cast<CpuCapability>(i));
  return best;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = limited();
  return capability;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace kore_fast
