// A B in float64 on a CPU.
//
// The narrower of the two sides is packed whole, in panels; the other by strips, a group of which is a thread's. Each
// sum has its order, so that results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>

#include "common/memory.h"
#include "nullspace/packing.h"

namespace kore_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// out (rows, columns) = A B, or −= A B where `subtract`.
void multiply(View<const double> A, View<const double> B, View<double> out, bool subtract) {
  if (out.rows < out.columns) {  // the other way round: outᵀ = Bᵀ Aᵀ
    const auto transposed = [](auto view) {
      std::swap(view.rows, view.columns);
      std::swap(view.row, view.column);
      return view;
    };
    const View<const double> left = transposed(B);
    B = transposed(A);
    A = left;
    out = transposed(out);
  }
  const PanelKernel& kernel = panel_kernel();
  const int64_t depth = A.columns, panel = kernel.panel, strip = kernel.strip;
  const int64_t panels = up_to(out.columns, panel) / panel, strips = up_to(out.rows, strip) / strip;
  const Memory right = aligned("product_native", static_cast<size_t>(panels * depth * panel) * sizeof(double));
  double* const b = static_cast<double*>(right.get());
  const auto columns_of = [&](int64_t p) { return std::min(panel, out.columns - p * panel); };
  torch::stable::parallel_for(0, panels, worth_a_thread(depth * panel), [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p)
      pack_strips({B.at(0, p * panel), columns_of(p), depth, B.column, B.row}, panel, b + p * depth * panel);
  });
  torch::stable::parallel_for(0, strips, worth_a_thread(depth * panels * panel * strip), [&](int64_t from, int64_t to) {
    const int64_t most = std::min(kStrips, to - from), tile = strip * panel;
    const Memory left = aligned("product_native", static_cast<size_t>(most * strip * kDepth) * sizeof(double));
    const Memory sums = aligned("product_native", static_cast<size_t>(panels * most * tile) * sizeof(double));
    double* const a = static_cast<double*>(left.get());
    double* const x = static_cast<double*>(sums.get());
    for (int64_t first = from; first < to; first += most) {
      const int64_t now = std::min(most, to - first), row = first * strip, rows = std::min(now * strip, out.rows - row);
      std::fill_n(x, panels * most * tile, 0.0);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t deep = std::min(kDepth, depth - k);
        pack_strips({A.at(row, k), rows, deep, A.row, A.column}, strip, a);
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t s = 0; s < now; ++s)
            kernel.subtract(a + s * strip * deep, b + (p * depth + k) * panel, deep, columns_of(p),
                            x + (p * most + s) * tile);
      }
      const auto put = [&](int64_t r, int64_t c) {
        const double less = x[c / panel * most * tile + r * panel + c % panel];
        double* const place = out.at(row + r, c);
        *place = subtract ? *place + less : -less;
      };
      if (std::abs(out.row) < std::abs(out.column)) {
        for (int64_t c = 0; c < out.columns; ++c)
          for (int64_t r = 0; r < rows; ++r) put(r, c);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < out.columns; ++c) put(r, c);
      }
    }
  });
}

template <typename T>
View<T> view(T* first, const Tensor& of) {
  return {first, of.size(0), of.size(1), of.stride(0), of.stride(1)};
}

void check(const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(A.dim() == 2 && B.dim() == 2 && A.size(1) == B.size(0) && A.is_cpu() && B.is_cpu() &&
                      A.scalar_type() == ScalarType::Double && B.scalar_type() == ScalarType::Double,
                  "product_native: want A (n, k) and B (k, m) in float64 on the CPU");
}

void multiply(const Tensor& A, const Tensor& B, Tensor& out, bool subtract) {
  multiply(view(static_cast<const double*>(A.const_data_ptr()), A), view(static_cast<const double*>(B.const_data_ptr()), B),
           view(static_cast<double*>(out.mutable_data_ptr()), out), subtract);
}

Tensor product_native_cpu(Tensor A, Tensor B) {
  check(A, B);
  Tensor out = torch::stable::new_empty(A, {A.size(0), B.size(1)});
  multiply(A, B, out, false);
  return out;
}

void subtract_product_native_cpu_(Tensor X, Tensor A, Tensor B) {
  check(A, B);
  STD_TORCH_CHECK(X.dim() == 2 && X.size(0) == A.size(0) && X.size(1) == B.size(1) && X.is_cpu() &&
                      X.scalar_type() == ScalarType::Double,
                  "subtract_product_native_: want X (n, m) in float64 on the CPU");
  multiply(A, B, X, true);
}

}  // namespace
}  // namespace kore_fast

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CPU, library) {
  library.impl("product_native", TORCH_BOX(&kore_fast::product_native_cpu));
  library.impl("subtract_product_native_", TORCH_BOX(&kore_fast::subtract_product_native_cpu_));
}
