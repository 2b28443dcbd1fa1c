// L⁻¹ V or L⁻ᵀ V in float64 on a CPU: in which blocks, on which thread.
//
//   V ──pack──▶ panels of columns ──substitute(), subtract()──▶ the same panels ──unpack──▶ result
//
// Right-looking: the rows of a diagonal block are solved (a panel is a thread's), then their products are subtracted
// from all rows that follow (strips of those are a thread's, packed once for all panels). Each sum has its order, so
// that results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/memory.h"
#include "common/packing.h"
#include "common/panels.h"

namespace kore_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "solve_triangular_native";
constexpr int64_t kWaveBytes = 16 << 20;  // panels that go through L together: in the last-level cache

class Solve {
 public:
  // L (n, n) is lower triangular; V and out (n, columns).
  Solve(const View<const double>& L, const View<const double>& V, const View<double>& out)
      : L_(L), V_(V), out_(out), kernel_(panel_kernel<double>()), padded_(up_to(V.rows, kernel_.strip)) {}

  void run() {
    const int64_t panel = kernel_.panel, bytes = padded_ * panel * static_cast<int64_t>(sizeof(double));
    const int64_t panels = (V_.columns + panel - 1) / panel, most = std::max<int64_t>(1, kWaveBytes / bytes);
    const Memory x = aligned(kName, static_cast<size_t>(std::min(panels, most) * bytes));
    const Memory block = aligned(kName, kDepth * (kDepth + kernel_.strip) * sizeof(double));
    x_ = static_cast<double*>(x.get());
    block_ = static_cast<double*>(block.get());
    for (first_ = 0; first_ < panels; first_ += most) {
      const int64_t wave = std::min(most, panels - first_);
      each_panel(wave, V_.rows, [&](int64_t p) { pack(p); });
      for (int64_t start = 0; start < V_.rows; start += kDepth) {
        const int64_t end = std::min(start + kDepth, padded_);
        pack_block(start, end);
        each_panel(wave, (end - start) * (end - start), [&](int64_t p) { solve_block(p, start, end); });
        subtract_below(wave, start, end);
      }
      each_panel(wave, V_.rows, [&](int64_t p) { unpack(p); });
    }
  }

 private:
  // Panels of a wave, on as many threads as `work` (a column's operations) is worth.
  template <typename Run>
  void each_panel(int64_t wave, int64_t work, Run run) const {
    torch::stable::parallel_for(0, wave, worth_a_thread(work * kernel_.panel), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) run(p);
    });
  }

  double* rows_of(int64_t p, int64_t row) const { return x_ + (p * padded_ + row) * kernel_.panel; }
  int64_t columns_of(int64_t p) const {
    return std::min(kernel_.panel, V_.columns - (first_ + p) * kernel_.panel);
  }

  // A panel is a strip of Vᵀ.
  void pack(int64_t p) const {
    const int64_t first = (first_ + p) * kernel_.panel;
    pack_strips(View<const double>{V_.at(0, first), columns_of(p), V_.rows, V_.column, V_.row}, kernel_.panel, rows_of(p, 0));
    std::fill(rows_of(p, V_.rows), rows_of(p, padded_), 0.0);
  }

  void unpack(int64_t p) const {
    const int64_t first = (first_ + p) * kernel_.panel, columns = columns_of(p);
    for (int64_t i = 0; i < out_.rows; ++i)
      std::copy_n(rows_of(p, i), columns, out_.at(i, first));
  }

  // Columns [start, end) of the matrix in `strips` strips from a row on.
  View<const double> part(int64_t row, int64_t strips, int64_t start, int64_t end) const {
    return {L_.at(row, start), std::min(strips * kernel_.strip, V_.rows - row), end - start, L_.row, L_.column};
  }

  // The diagonal block's strips, one after the other, with inverted diagonal; rows past the last are those of I.
  void pack_block(int64_t start, int64_t end) const {
    double* to = block_;
    for (int64_t row = start; row < end; row += kernel_.strip) {
      const int64_t whole = std::min(row + kernel_.strip, V_.rows);
      pack_strips(part(row, 1, start, whole), kernel_.strip, to);
      double* const own = to + (row - start) * kernel_.strip;
      for (int64_t i = 0; i < kernel_.strip; ++i) {
        double& diagonal = own[i * kernel_.strip + i];
        diagonal = row + i < V_.rows ? 1 / diagonal : 1;
        if (row + i >= V_.rows) std::fill(own + i * kernel_.strip + i + 1, own + (i + 1) * kernel_.strip, 0.0);
      }
      to = own + kernel_.strip * kernel_.strip;
    }
  }

  void solve_block(int64_t p, int64_t start, int64_t end) const {
    const double* a = block_;
    for (int64_t row = start; row < end; row += kernel_.strip) {
      kernel_.subtract(a, rows_of(p, start), row - start, columns_of(p), rows_of(p, row));
      a += (row - start) * kernel_.strip;
      kernel_.substitute(a, columns_of(p), rows_of(p, row));
      a += kernel_.strip * kernel_.strip;
    }
  }

  void subtract_below(int64_t wave, int64_t start, int64_t end) const {
    if (end >= V_.rows) return;
    const int64_t strips = (padded_ - end) / kernel_.strip, size = kernel_.strip * (end - start);
    torch::stable::parallel_for(0, strips, kStrips, [&](int64_t from, int64_t to) {
      const Memory packed = aligned(kName, static_cast<size_t>(kStrips * size) * sizeof(double));
      double* const a = static_cast<double*>(packed.get());
      for (int64_t first = from; first < to; first += kStrips) {
        const int64_t now = std::min(kStrips, to - first), row = end + first * kernel_.strip;
        pack_strips(part(row, now, start, end), kernel_.strip, a);
        for (int64_t p = 0; p < wave; ++p)
          for (int64_t s = 0; s < now; ++s)
            kernel_.subtract(a + s * size, rows_of(p, start), end - start, columns_of(p),
                             rows_of(p, row + s * kernel_.strip));
      }
    });
  }

  const View<const double> L_;
  const View<const double> V_;
  const View<double> out_;
  const PanelKernel<double>& kernel_;
  const int64_t padded_;  // rows of a panel: whole strips
  double* x_ = nullptr;
  double* block_ = nullptr;
  int64_t first_ = 0;  // the wave's first panel
};

Tensor solve_triangular_native_cpu(Tensor L, Tensor V, bool transposed) {
  const int64_t n = L.dim() == 2 ? L.size(0) : -1;
  STD_TORCH_CHECK(n >= 0 && L.size(1) == n && V.dim() == 2 && V.size(0) == n && L.is_cpu() && V.is_cpu() &&
                      L.scalar_type() == ScalarType::Double && V.scalar_type() == ScalarType::Double,
                  kName, ": want L (n, n) and V (n, columns) in float64 on the CPU");
  const int64_t columns = V.size(1);
  Tensor out = torch::stable::new_empty(V, {n, columns});
  if (V.numel() == 0) return out;
  View<const double> triangle{static_cast<const double*>(L.const_data_ptr()), n, n, L.stride(0), L.stride(1)};
  View<const double> from{static_cast<const double*>(V.const_data_ptr()), n, columns, V.stride(0), V.stride(1)};
  View<double> to{static_cast<double*>(out.mutable_data_ptr()), n, columns, columns, 1};
  if (transposed) {  // Lᵀ is lower triangular from its last row and column on
    triangle = {triangle.at(n - 1, n - 1), n, n, -L.stride(1), -L.stride(0)};
    from = {from.at(n - 1, 0), n, columns, -V.stride(0), V.stride(1)};
    to = {to.at(n - 1, 0), n, columns, -columns, 1};
  }
  Solve(triangle, from, to).run();
  return out;
}

}  // namespace
}  // namespace kore_fast

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CPU, library) {
  library.impl("solve_triangular_native", TORCH_BOX(&kore_fast::solve_triangular_native_cpu));
}
