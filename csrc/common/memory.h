// Working memory of the CPU kernels.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace kore_fast {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Bytes on a cache line's border; `what` asks for them.
inline Memory aligned(const char* what, size_t bytes) {
  void* memory = std::aligned_alloc(64, bytes / 64 * 64 + 64);
  STD_TORCH_CHECK(memory != nullptr, what, ": no memory for ", bytes, " bytes");
  return Memory(memory);
}

}  // namespace kore_fast
