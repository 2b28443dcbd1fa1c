// Vectors of an instruction set, written with the compiler's own vector types.
#pragma once

namespace kore_fast {

template <typename T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

}  // namespace kore_fast
