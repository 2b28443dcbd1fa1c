// Sums of dense products on a CPU.
//
// Of each product the right side is packed whole, in panels; the left by strips, a group of which is a thread's. Each
// sum has its order, so that results do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "common/packing.h"
#include "common/panels.h"

namespace kore_fast {

constexpr int64_t kSums = 256;       // strips times panels that are summed at once, where that is more than kStrips
constexpr int64_t kMostStrips = 32;

// factor · left · right, of elements E, summed in T.
template <typename E, typename T>
struct Product {
  View<const E> left, right;
  T factor = 1;
};

template <typename E>
View<E> transposed(View<E> view) {
  std::swap(view.rows, view.columns);
  std::swap(view.row, view.column);
  return view;
}

// put(i, j, value) for every element of the sum of products, (rows, columns). `by_row`: of places that follow each
// other, those of a row are next to each other where it writes.
template <typename E, typename T, typename Put>
void multiply_wide(const char* what, const std::vector<Product<E, T>>& products, int64_t rows, int64_t columns,
                   bool by_row, const Put& put) {
  const PanelKernel<T>& kernel = panel_kernel<T>();
  const int64_t panel = kernel.panel, strip = kernel.strip;
  const int64_t panels = up_to(columns, panel) / panel, strips = up_to(rows, strip) / strip;
  int64_t depth = 0;
  for (const auto& product : products) depth += product.left.columns;
  const Memory right = aligned(what, static_cast<size_t>(panels * depth * panel) * sizeof(T));
  T* const b = static_cast<T*>(right.get());
  const auto columns_of = [&](int64_t p) { return std::min(panel, columns - p * panel); };
  torch::stable::parallel_for(0, panels, worth_a_thread(depth * panel), [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      T* out = b + p * depth * panel;
      for (const auto& [left, right, factor] : products) {
        pack_strips(View<const E>{right.at(0, p * panel), columns_of(p), right.rows, right.column, right.row}, panel,
                    out, factor);
        out += right.rows * panel;
      }
    }
  });
  torch::stable::parallel_for(0, strips, worth_a_thread(depth * panels * panel * strip), [&](int64_t from, int64_t to) {
    // Where a few panels leave room in the cache, many strips at once: down columns, a page is then read once.
    const int64_t fit = std::clamp(kSums / std::max<int64_t>(1, panels), kStrips, kMostStrips);
    const int64_t most = std::min(fit, to - from), tile = strip * panel;
    const Memory packed = aligned(what, static_cast<size_t>(most * strip * kDepth) * sizeof(T));
    const Memory sums = aligned(what, static_cast<size_t>(panels * most * tile) * sizeof(T));
    T* const a = static_cast<T*>(packed.get());
    T* const x = static_cast<T*>(sums.get());
    for (int64_t first = from; first < to; first += most) {
      const int64_t now = std::min(most, to - first), row = first * strip, here = std::min(now * strip, rows - row);
      std::fill_n(x, panels * most * tile, T{0});
      int64_t done = 0;
      for (const auto& product : products) {
        const View<const E>& left = product.left;
        for (int64_t k = 0; k < left.columns; k += kDepth) {
          const int64_t deep = std::min(kDepth, left.columns - k);
          pack_strips(View<const E>{left.at(row, k), here, deep, left.row, left.column}, strip, a);
          for (int64_t p = 0; p < panels; ++p)
            for (int64_t s = 0; s < now; ++s)
              kernel.subtract(a + s * strip * deep, b + (p * depth + done + k) * panel, deep, columns_of(p),
                              x + (p * most + s) * tile);
        }
        done += left.columns;
      }
      for (int64_t p = 0; p < panels; ++p) {
        const T* const sum = x + p * most * tile;
        const int64_t start = p * panel, width = columns_of(p);
        if (by_row) {
          for (int64_t r = 0; r < here; ++r)
            for (int64_t c = 0; c < width; ++c) put(row + r, start + c, -sum[r * panel + c]);
        } else {
          for (int64_t c = 0; c < width; ++c)
            for (int64_t r = 0; r < here; ++r) put(row + r, start + c, -sum[r * panel + c]);
        }
      }
    }
  });
}

// The sum of products, given to put(place, i, j, value) for each element of `out`.
template <typename E, typename T, typename O, typename Put>
void multiply(const char* what, std::vector<Product<E, T>> products, View<O> out, const Put& put) {
  const bool by_row = std::abs(out.column) <= std::abs(out.row);
  if (out.rows >= out.columns) {
    multiply_wide(what, products, out.rows, out.columns, by_row,
                  [&](int64_t i, int64_t j, T value) { put(out.at(i, j), i, j, value); });
    return;
  }
  // The other way round, so that the narrower side is packed whole.
  for (auto& product : products) {
    product.left = transposed(product.left);
    product.right = transposed(product.right);
    std::swap(product.left, product.right);
  }
  multiply_wide(what, products, out.columns, out.rows, !by_row,
                [&](int64_t j, int64_t i, T value) { put(out.at(i, j), i, j, value); });
}

}  // namespace kore_fast
