// C += Σ w x xᵀ over the rows of x, one triangle, on a CPU: which rows, in which blocks, on which thread.
//
//   rows of x ──keep──▶ chunks of tokens ──pack──▶ panels of columns ──panels()──▶ float64 tile ──▶ C
//
// A chunk is packed once (never all of x) and shared by all threads. A thread owns a tile of C: it sums the chunk's
// tokens there in float64 and adds the tile to C once a chunk. The sums do not depend on the number of threads.

#include "covariance/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/cpu_capability.h"
#include "common/memory.h"

namespace kore_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkBytes = 32 << 20;  // packed tokens, in the last-level cache or near it
constexpr int64_t kTileColumns = 192;      // a tile's float64 sums take 288 KiB: they stay in the second-level cache

const CovarianceKernel& kernel_for(Type type, bool weighted) {
  const CovarianceKernels* set = &covariance_generic;
#if defined(KORE_FAST_X86)
  switch (cpu_capability()) {
    case CpuCapability::kAvx512Bf16: set = &covariance_avx512_bf16; break;
    case CpuCapability::kAvx512: set = &covariance_avx512; break;
    case CpuCapability::kAvx2: set = &covariance_avx2; break;
    case CpuCapability::kGeneric: break;
  }
#endif
  switch (type) {
    case Type::kFloat: return set->of_float;
    case Type::kDouble: return set->of_double;
    case Type::kHalf: return set->of_half;
    case Type::kBFloat16: break;
  }
  return weighted ? set->of_bfloat16_weighted : set->of_bfloat16;
}

// Offsets, in elements, of all rows of x below its dimension `from`, the last dimension left out.
std::vector<int64_t> row_offsets(const Tensor& x, int64_t from) {
  std::vector<int64_t> offsets{0};
  for (int64_t dim = from; dim + 1 < x.dim(); ++dim) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * x.size(dim));
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < x.size(dim); ++i) finer.push_back(offset + i * x.stride(dim));
    offsets = std::move(finer);
  }
  return offsets;
}

struct Kept {
  std::vector<int64_t> offset;
  std::vector<double> factor;  // √w, so that x keeps one packed copy: rounding √w·x perturbs x, never C's symmetry
};

// The rows to add: neither masked, nor of weight zero, nor broken (a value or weight not finite, a weight below zero).
// Updates the three counts.
Kept keep_rows(const CovarianceKernel& kernel, const char* x, size_t element, int64_t stride, int64_t d,
               const std::vector<int64_t>& offsets, const bool* mask, const double* scale, double* count) {
  enum : char { kOut, kIn, kBroken };
  const int64_t n = static_cast<int64_t>(offsets.size());
  std::vector<char> state(n, kOut);
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, 65536 / d), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if ((mask == nullptr || mask[t]) && (scale == nullptr || scale[t] != 0)) {
        const bool weighed = scale == nullptr || (std::isfinite(scale[t]) && scale[t] > 0);
        const char* row = x + offsets[t] * static_cast<int64_t>(element);
        state[t] = weighed && kernel.all_finite(row, stride, d) ? kIn : kBroken;
      }
  });
  Kept kept;
  kept.offset.reserve(n);
  if (scale != nullptr) kept.factor.reserve(n);
  double weight = 0, broken = 0;
  for (int64_t t = 0; t < n; ++t) {
    broken += state[t] == kBroken;
    if (state[t] != kIn) continue;
    kept.offset.push_back(offsets[t]);
    if (scale != nullptr) kept.factor.push_back(std::sqrt(scale[t]));
    weight += scale == nullptr ? 1.0 : scale[t];
  }
  count[0] += static_cast<double>(kept.offset.size());
  count[1] += weight;
  count[2] += broken;
  return kept;
}

// C[rows of panel i, columns of panel j] += sums, below and on the diagonal.
template <typename T>
void add_panel(T* C, int64_t ld, int64_t d, int64_t panel, int64_t i, int64_t j, const double* sums) {
  for (int64_t r = 0; r < panel && i * panel + r < d; ++r, sums += panel) {
    const int64_t row = i * panel + r;
    T* to = C + row * ld + j * panel;
    const int64_t width = std::min(panel, row - j * panel + 1);
    for (int64_t c = 0; c < width; ++c) to[c] = static_cast<T>(to[c] + sums[c]);
  }
}

template <typename T>
void accumulate(const CovarianceKernel& kernel, T* C, int64_t ld, const void* x, int64_t stride, int64_t d,
                const Kept& kept) {
  const int64_t tokens = static_cast<int64_t>(kept.offset.size());
  if (tokens == 0) return;
  const int64_t panel = kernel.panel, panels = (d + panel - 1) / panel;
  const int64_t token_bytes = panel * static_cast<int64_t>(kernel.element);
  const int64_t most = std::max(kernel.depth, kChunkBytes / (panels * token_bytes) / kernel.depth * kernel.depth);
  const int64_t chunk = std::min(most, (tokens + kernel.grain - 1) / kernel.grain * kernel.grain);
  const Memory packed = aligned("covariance_update_", static_cast<size_t>(panels * chunk * token_bytes));
  char* const base = static_cast<char*>(packed.get());

  int64_t side = std::max<int64_t>(1, kTileColumns / panel);
  const int64_t threads = torch::stable::get_num_threads();
  auto tiles_of = [&](int64_t s) { return ((panels + s - 1) / s) * ((panels + s - 1) / s + 1) / 2; };
  while (side > 1 && tiles_of(side) < 8 * threads) side /= 2;

  for (int64_t start = 0; start < tokens; start += chunk) {
    const int64_t now = std::min(chunk, tokens - start);
    const int64_t padded = (now + kernel.grain - 1) / kernel.grain * kernel.grain;
    const Rows rows{x, kept.offset.data() + start, kept.factor.empty() ? nullptr : kept.factor.data() + start,
                    now, d, stride};
    const int64_t few = std::max<int64_t>(1, 65536 / (now * panel));
    torch::stable::parallel_for(0, panels, few, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) kernel.pack(rows, p * panel, base + p * chunk * token_bytes);
    });
    const int64_t grain = std::max<int64_t>(1, 262144 / (side * side * panel * panel * now));
    torch::stable::parallel_for(0, tiles_of(side), grain, [&](int64_t begin, int64_t end) {
      const Memory tile = aligned("covariance_update_", static_cast<size_t>(side * side * panel * panel) * sizeof(double));
      double* const sums = static_cast<double*>(tile.get());
      for (int64_t id = begin; id < end; ++id) {
        // Tiles of the lower triangle, row by row: id = row (row + 1) / 2 + column.
        int64_t row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(id) + 1) - 1) / 2);
        while (row * (row + 1) / 2 > id) --row;
        while ((row + 1) * (row + 2) / 2 <= id) ++row;
        const int64_t i0 = row * side, i1 = std::min(i0 + side, panels);
        const int64_t j0 = (id - row * (row + 1) / 2) * side, j1 = std::min(j0 + side, panels);
        const auto at = [&](int64_t i, int64_t j) { return sums + ((i - i0) * side + (j - j0)) * panel * panel; };
        const auto rows_of = [&](int64_t i) { return std::min(panel, d - i * panel); };
        for (int64_t j = j0; j < j1; ++j)
          for (int64_t i = std::max(i0, j); i < i1; ++i) std::fill_n(at(i, j), rows_of(i) * panel, 0.0);
        for (int64_t k = 0; k < padded; k += kernel.depth)
          for (int64_t j = j0; j < j1; ++j)
            for (int64_t i = std::max(i0, j); i < i1; ++i)
              kernel.panels(base + (i * chunk + k) * token_bytes, base + (j * chunk + k) * token_bytes,
                            std::min(kernel.depth, padded - k), rows_of(i), i == j, at(i, j));
        for (int64_t i = i0; i < i1; ++i)
          for (int64_t j = j0; j < std::min(j1, i + 1); ++j) add_panel(C, ld, d, panel, i, j, at(i, j));
      }
    });
  }
}

std::optional<Type> type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::Double: return Type::kDouble;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: return std::nullopt;
  }
}

// Whether `rows` has one value of `type` for each row of x, one after the other.
bool one_a_row(const Tensor& rows, ScalarType type, const Tensor& x) {
  if (!rows.is_cpu() || rows.scalar_type() != type || rows.dim() != x.dim() - 1 || !rows.is_contiguous()) return false;
  for (int64_t dim = 0; dim < rows.dim(); ++dim)
    if (rows.size(dim) != x.size(dim)) return false;
  return true;
}

// Whether the arguments are right as they are: C (d, d) or (group, d, d), float32 or float64, row-major; count (…, 3)
// float64; x (…, rows…, d); mask bool and scale float64 like x without its last dimension; all but x and C contiguous.
bool ready(const Tensor& C, const Tensor& count, const Tensor& x, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& scale) {
  const int64_t dims = C.dim(), group_dims = dims - 2;
  if ((group_dims != 0 && group_dims != 1) || x.dim() < dims || count.dim() != dims - 1) return false;
  if (!C.is_cpu() || !count.is_cpu() || !x.is_cpu() || !type_of(x.scalar_type())) return false;
  if (C.scalar_type() != ScalarType::Double && C.scalar_type() != ScalarType::Float) return false;
  if (count.scalar_type() != ScalarType::Double || count.size(dims - 2) != 3 || !count.is_contiguous()) return false;
  const int64_t d = C.size(dims - 1), ld = C.stride(dims - 2);
  if (x.numel() == 0 || C.size(dims - 2) != d || x.size(x.dim() - 1) != d) return false;
  if (d > 1 && (C.stride(dims - 1) != 1 || ld < d)) return false;
  if (group_dims == 1) {
    const int64_t groups = C.size(0), step = C.stride(0);
    if (x.size(0) != groups || count.size(0) != groups) return false;
    const bool apart = step >= (d - 1) * ld + d, interleaved = step >= d && ld >= (groups - 1) * step + d;
    if (groups > 1 && !apart && !interleaved) return false;
  }
  return (!mask || one_a_row(*mask, ScalarType::Bool, x)) && (!scale || one_a_row(*scale, ScalarType::Double, x));
}

// What is ready().
void update(const Tensor& C, const Tensor& count, const Tensor& x, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& scale) {
  const int64_t group_dims = C.dim() - 2, d = x.size(x.dim() - 1), groups = group_dims == 0 ? 1 : C.size(0);
  const CovarianceKernel& kernel = kernel_for(*type_of(x.scalar_type()), scale.has_value());
  const std::vector<int64_t> offsets = row_offsets(x, group_dims);
  const int64_t rows = static_cast<int64_t>(offsets.size()), stride = x.stride(x.dim() - 1), ld = C.stride(C.dim() - 2);
  const size_t element = x.element_size();
  const char* values = static_cast<const char*>(x.const_data_ptr());
  const bool* masks = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const double* scales = scale ? static_cast<const double*>(scale->const_data_ptr()) : nullptr;
  double* counts = static_cast<double*>(count.mutable_data_ptr());
  for (int64_t g = 0; g < groups; ++g) {
    const char* from = values + (group_dims ? g * x.stride(0) * static_cast<int64_t>(element) : 0);
    const Kept kept = keep_rows(kernel, from, element, stride, d, offsets, masks ? masks + g * rows : nullptr,
                                scales ? scales + g * rows : nullptr, counts + 3 * g);
    const int64_t to = group_dims ? g * C.stride(0) : 0;
    if (C.scalar_type() == ScalarType::Double)
      accumulate(kernel, static_cast<double*>(C.mutable_data_ptr()) + to, ld, from, stride, d, kept);
    else
      accumulate(kernel, static_cast<float*>(C.mutable_data_ptr()) + to, ld, from, stride, d, kept);
  }
}

void covariance_update_native_cpu_(Tensor C, Tensor count, Tensor x, std::optional<Tensor> mask,
                                   std::optional<Tensor> scale) {
  STD_TORCH_CHECK(ready(C, count, x, mask, scale),
                  "covariance_update_native_: arguments that kore_fast.ops.covariance_update_ would refuse or prepare; "
                  "call that one");
  update(C, count, x, mask, scale);
}

bool covariance_update_if_ready_cpu_(Tensor C, Tensor count, Tensor x, std::optional<Tensor> mask,
                                     std::optional<Tensor> scale) {
  const bool taken = ready(C, count, x, mask, scale);
  if (taken) update(C, count, x, mask, scale);
  return taken;
}

// Tensors without values, of a graph that is traced: the general operation is what belongs there.
bool covariance_update_if_ready_meta_(Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>) {
  return false;
}

}  // namespace
}  // namespace kore_fast

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CPU, library) {
  library.impl("covariance_update_native_", TORCH_BOX(&kore_fast::covariance_update_native_cpu_));
  library.impl("covariance_update_if_ready_", TORCH_BOX(&kore_fast::covariance_update_if_ready_cpu_));
}

STABLE_TORCH_LIBRARY_IMPL(kore_fast, Meta, library) {
  library.impl("covariance_update_if_ready_", TORCH_BOX(&kore_fast::covariance_update_if_ready_meta_));
}
