// Packing of matrices for the kernels of panels.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "common/narrow.h"

namespace kore_fast {

constexpr int64_t kDepth = 256;  // products summed in registers at a time: of a panel they stay in the cache
constexpr int64_t kStrips = 8;   // packed at once

// Element (i, k) lies at first + i row + k column.
template <typename T>
struct View {
  T* first;
  int64_t rows, columns, row, column;
  T* at(int64_t i, int64_t k) const { return first + i * row + k * column; }
};

// How many pieces of work, each of so many products, are worth a thread.
inline int64_t worth_a_thread(int64_t products) { return 1 + 65536 / std::max<int64_t>(1, products); }

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Rows of `from`, times `factor`, in strips of `into`: out (strips, columns, into). Rows past the last are zero.
template <typename E, typename T>
void pack_strips(const View<const E>& from, int64_t into, T* out, T factor = 1) {
  const int64_t size = from.columns * into;  // of a strip
  if (std::abs(from.row) < std::abs(from.column)) {
    // Down the columns, through all strips: what lies together is read together.
    for (int64_t k = 0; k < from.columns; ++k)
      for (int64_t i = 0; i < from.rows; i += into) {
        T* const to = out + i / into * size + k * into;
        const int64_t here = std::min(into, from.rows - i);
        if (from.row == 1) {
          const E* const source = from.at(i, k);  // next to each other: vectors
          for (int64_t r = 0; r < here; ++r) to[r] = factor * widen(source[r]);
        } else {
          for (int64_t r = 0; r < here; ++r) to[r] = factor * widen(*from.at(i + r, k));
        }
        for (int64_t r = here; r < into; ++r) to[r] = 0;
      }
    return;
  }
  // Along the rows, a few columns at a time, whose places in the strip stay in the first-level cache.
  constexpr int64_t kColumns = 64;
  for (int64_t i = 0; i < from.rows; i += into)
    for (int64_t start = 0; start < from.columns; start += kColumns) {
      const int64_t end = std::min(start + kColumns, from.columns);
      for (int64_t r = 0; r < into; ++r) {
        T* const to = out + i / into * size + r;
        for (int64_t k = start; k < end; ++k) to[k * into] = i + r < from.rows ? factor * widen(*from.at(i + r, k)) : 0;
      }
    }
}

}  // namespace kore_fast
