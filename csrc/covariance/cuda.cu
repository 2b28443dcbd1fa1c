// Covariance on NVIDIA GPUs of compute capability 8.0 and up: C += Σ w x xᵀ over the kept rows of x (bf16 or fp16),
// lower triangle, C fp32 or fp64. Three or four launches on the current stream, no synchronisation, no atomics:
//
// 1. row_states: one warp a row: masked out, of weight 0, non-finite, or kept.
// 2. row_lists:  one block a group: the kept rows' numbers in order, their weights, the three counts.
// 3. product:    one block a 128 × 128 tile of the triangle. It gathers the listed rows only, so padding costs no
//                arithmetic, and a row left out is never read into a product (0 · inf would be NaN).
// 4. add_splits: only where there are few tiles (small d): several blocks shared a tile's rows; their sums are added in
//                order. How many depends on shapes and on the GPU's number of multiprocessors, on nothing else.
//
// Schedule. A linear block number becomes a tile (i, j), i ≥ j, by a square root that integers correct, in bands of 8
// rows of tiles (tile_of). Diagonal tiles are computed once, load one panel instead of two, and are stored on and below
// the diagonal. Edges in d and in rows are zeros in shared memory.
//   sm_80:  256 threads, mma.sync m16n8k16, 4 stages of 32 rows by cp.async, ldmatrix.trans on a swizzled layout.
//   sm_90a: a loading warpgroup (cp.async; the copy engine can't gather rows) and two that multiply by
//           wgmma m64n128k16 from shared memory, 6 stages of 64 rows between them on mbarriers.
// x whose rows don't start on 16 bytes, or with weights, goes through registers instead of cp.async.
// KORE_FAST_CUDA_PATH=sm80 or sm90 forces one; else compute capability 9.0 takes sm90 and any other sm80.
//
// Accumulation and error. Products of bf16 or fp16 are exact in fp32. Tensor cores add 16 at a time to an fp32
// accumulator, and cut (not round) what lies below the largest term's last bits. What is cut grows with the chain: an
// accumulator takes at most 128 products; then it is added, rounded to nearest and compensated (Kahan), to a second one
// in registers, and sum minus compensation goes to C in fp64 arithmetic. With S = Σ |w x_i x_j| over a call's rows:
//   |error of an entry| ≤ 2^-16 S at worst (8 instructions, 17 terms each, each cut below 2^-24 of the largest),
// plus one rounding of C in its own dtype. It does not grow with the number of rows. In emulation: ≤ 2^-20 S, 2^-19 S
// with weights; and of sums of one sign most of it is one common factor (1 - 1e-7), which moves no eigenvector: entries
// spread around it by 3e-8, where uncompensated second sums spread by 1.5e-7 (emulation_test.cpp asserts both).
// Products and sums of 128 of them have to lie in fp32's range.
//
// Weights. sqrt(w)·x in bf16 would lose w's accuracy. w·x is split exactly to 2^-26 into three bf16 parts that
// multiply x: three products for bf16 x; five for fp16 x, which is split too (w·x need not lie in fp16's range).
// w itself counts as fp32 sees it (relative error 2^-25 of the row's weight).
//
// speed: not measured (figures come from benchmarks/results only).

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../common/cuda_device.cuh"
#include "../common/cuda_host.h"
#include "cuda_kernels.cuh"

namespace kore_fast::covariance {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kStateThreads = 256, kListThreads = 1024;

__global__ void __launch_bounds__(kStateThreads) row_states_kernel(Rows a) {
  Device p;
  row_states(p, a);
}

__global__ void __launch_bounds__(kListThreads) row_lists_kernel(Rows a) {
  Device p;
  row_lists(p, a);
}

template <Format F, Load L, class Acc>
__global__ void __launch_bounds__(Sm80::kThreads, 1) product_sm80_kernel(Product a) {
  Device p;
  product_sm80<Device, F, L, Acc>(p, a);
}

template <Format F, Load L, class Acc>
__global__ void __launch_bounds__(Sm90::kThreads, 1) product_sm90_kernel(Product a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Device p;
  product_sm90<Device, F, L, Acc>(p, a);
#else
  __trap();  // use_sm90 keeps other machine code from being launched
#endif
}

template <class Path, class Acc>
__global__ void __launch_bounds__(kWorkers) add_splits_kernel(Product a) {
  Device p;
  add_splits<Device, Path, Acc>(p, a);
}

constexpr Call call{"covariance_update_"};

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  call.fail(words...);
}

void check(cudaError_t error, const char* what) { call.check(error, what); }

template <class Path, class Acc, class Kernel>
void launch_product(Kernel kernel, const Product& a, int64_t groups, cudaStream_t stream) {
  constexpr int shared = Path::kShared + kAlignment;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "shared memory of the product");
  const unsigned tiles = unsigned(tile_count(a.d));
  kernel<<<dim3(tiles, unsigned(groups), unsigned(a.splits)), Path::kThreads, shared, stream>>>(a);
  check(cudaGetLastError(), "launch of the product");
  if (a.splits == 1) return;
  add_splits_kernel<Path, Acc><<<dim3(tiles, unsigned(groups), kValues / kPart), kWorkers, 0, stream>>>(a);
  check(cudaGetLastError(), "launch of the sum of parts");
}

template <Format F, Load L, class Acc>
void multiply(bool sm90, const Product& a, int64_t groups, cudaStream_t stream) {
  if (sm90)
    launch_product<Sm90, Acc>(product_sm90_kernel<F, L, Acc>, a, groups, stream);
  else
    launch_product<Sm80, Acc>(product_sm80_kernel<F, L, Acc>, a, groups, stream);
}

template <Format F, class Acc>
void multiply(Load load, bool sm90, const Product& a, int64_t groups, cudaStream_t stream) {
  switch (load) {
    case Load::async: return multiply<F, Load::async, Acc>(sm90, a, groups, stream);
    case Load::copy: return multiply<F, Load::copy, Acc>(sm90, a, groups, stream);
    case Load::weighted: return multiply<F, Load::weighted, Acc>(sm90, a, groups, stream);
  }
}

// x as (groups, rows, d) with one stride a row, or a copy where its token dimensions don't have one.
struct Flat {
  Tensor x;
  int64_t group_stride, row_stride;
};

Flat flatten(Tensor x, bool grouped, int64_t d) {
  const auto fits = [&](const Tensor& t, int64_t& row_stride) {
    row_stride = d;
    if (d > 1 && t.stride(t.dim() - 1) != 1) return false;
    int64_t expected = -1;  // what the next dimension outwards must have
    for (int64_t i = t.dim() - 2; i >= (grouped ? 1 : 0); --i) {
      if (t.size(i) == 1) continue;
      if (expected < 0)
        row_stride = t.stride(i);
      else if (t.stride(i) != expected)
        return false;
      expected = t.stride(i) * t.size(i);
    }
    return true;
  };
  int64_t row_stride = 0;
  if (!fits(x, row_stride)) {
    x = torch::stable::contiguous(x);
    fits(x, row_stride);
  }
  return {x, grouped ? x.stride(0) : 0, row_stride};
}

Scale scale_kind(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return Scale::fp16;
    case ScalarType::BFloat16: return Scale::bf16;
    case ScalarType::Float: return Scale::fp32;
    case ScalarType::Double: return Scale::fp64;
    default: return Scale::none;
  }
}

void covariance_update(Tensor C, Tensor count, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> scale) {
  if (C.dim() != 2 && C.dim() != 3) fail("C has shape ", shape(C), ", want (d, d) or (group, d, d)");
  const bool grouped = C.dim() == 3;
  const int64_t d = C.size(C.dim() - 1), groups = grouped ? C.size(0) : 1;
  if (C.size(C.dim() - 2) != d || x.dim() < C.dim() || x.size(x.dim() - 1) != d || (grouped && x.size(0) != groups))
    fail("x ", shape(x), " does not fit C ", shape(C), ": want (*group, tokens, d)");
  if (count.dim() != C.dim() - 1 || count.size(count.dim() - 1) != 3 || (grouped && count.size(0) != groups))
    fail("count has shape ", shape(count), ", want (*group, 3)");
  const ScalarType type = x.scalar_type(), accumulator = C.scalar_type();
  if (type != ScalarType::BFloat16 && type != ScalarType::Half)
    fail("x has to be bfloat16 or float16; use backend=\"reference\" for float32 and float64, "
         "whose products cuBLAS computes as they are");
  if (accumulator != ScalarType::Float && accumulator != ScalarType::Double) fail("C has to be float32 or float64");
  if (count.scalar_type() != ScalarType::Double || !count.is_contiguous()) fail("count has to be contiguous float64");
  if (d > 1 && (C.stride(C.dim() - 1) != 1 || C.stride(C.dim() - 2) < d))
    fail("C has to be row-major without overlapping rows");
  const auto on_device = [&](const Tensor& t, const char* name) {
    if (t.get_device_index() != x.get_device_index() || !t.is_cuda()) fail(name, " is not on x's device");
  };
  on_device(C, "C");
  on_device(count, "count");
  const auto one_a_row = [&](const Tensor& t, const char* name) {
    on_device(t, name);
    bool same = t.dim() == x.dim() - 1;
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == x.size(i);
    if (!same) fail(name, " has shape ", shape(t), ", want one value a row of x ", shape(x));
  };
  if (mask) one_a_row(*mask, "mask");
  if (scale) one_a_row(*scale, "scale");
  if (x.numel() == 0) return;
  const int64_t rows = x.numel() / (groups * d);
  if (rows >= INT32_MAX || d >= INT32_MAX / 2 || groups > 65535)
    fail("more than 65535 groups, or 2^31 rows of a group or columns");

  const int device = x.get_device_index();
  // torch's guard restores the device as torch sees it; this library's own CUDA runtime is told separately.
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(cudaSetDevice(device), "cudaSetDevice");
  const bool sm90 = call.use_sm90(device, product_sm90_kernel<Format::bf16, Load::async, double>);
  const cudaStream_t stream = call.current_stream(device);

  const Flat flat = flatten(x, grouped, d);
  if (mask) mask = torch::stable::contiguous(*mask);
  if (scale) {
    if (scale_kind(scale->scalar_type()) == Scale::none) scale = torch::stable::to(*scale, ScalarType::Double);
    scale = torch::stable::contiguous(*scale);
  }

  // One allocation from torch's caching allocator: index, weight, kept, state.
  const int64_t total = groups * rows, weights = scale ? total : 0;
  const int64_t bytes = 4 * (total + weights + groups) + total;
  Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);

  Rows r{};
  r.x = static_cast<const uint16_t*>(flat.x.data_ptr());
  r.x_group = flat.group_stride;
  r.x_row = flat.row_stride;
  r.groups = groups;
  r.rows = rows;
  r.d = int(d);
  r.aligned = reinterpret_cast<uintptr_t>(r.x) % 16 == 0 && r.x_row % kChunk == 0 && r.x_group % kChunk == 0;
  r.exponent = type == ScalarType::BFloat16 ? 0x7f80 : 0x7c00;
  r.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  r.mask_bytes = mask ? int(mask->element_size()) : 0;
  r.scale = scale ? scale->data_ptr() : nullptr;
  r.scale_kind = scale ? scale_kind(scale->scalar_type()) : Scale::none;
  r.narrow = accumulator == ScalarType::Float;
  r.index = static_cast<int32_t*>(scratch.data_ptr());
  r.weight = reinterpret_cast<float*>(r.index + total);
  r.kept = r.index + total + weights;
  r.state = reinterpret_cast<uint8_t*>(r.kept + groups);
  r.count = static_cast<double*>(count.data_ptr());

  constexpr int warps = kStateThreads / 32;
  if ((total + warps - 1) / warps >= INT32_MAX) fail("more than 2^34 rows in all groups");
  row_states_kernel<<<unsigned((total + warps - 1) / warps), kStateThreads, 0, stream>>>(r);
  check(cudaGetLastError(), "launch of the rows' states");
  row_lists_kernel<<<unsigned(groups), kListThreads, row_lists_shared(kListThreads) + kAlignment, stream>>>(r);
  check(cudaGetLastError(), "launch of the rows' lists");

  Product a{};
  a.x = r.x;
  a.x_group = r.x_group;
  a.x_row = r.x_row;
  a.rows = rows;
  a.d = r.d;
  a.index = r.index;
  a.weight = r.weight;
  a.kept = r.kept;
  a.C = C.data_ptr();
  a.C_group = grouped ? C.stride(0) : 0;
  a.C_row = d > 1 ? C.stride(C.dim() - 2) : 1;
  const int processors = call.attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t tiles = groups * tile_count(a.d);
  a.splits = split_count(tiles, rows, processors);
  std::optional<Tensor> parts;
  if (a.splits > 1) {
    parts = torch::stable::new_empty(x, {tiles * a.splits * kValues * kWorkers}, ScalarType::Double);
    a.partial = static_cast<double*>(parts->data_ptr());
  }
  const Load load = scale ? Load::weighted : r.aligned ? Load::async : Load::copy;
  if (type == ScalarType::BFloat16)
    r.narrow ? multiply<Format::bf16, float>(load, sm90, a, groups, stream)
             : multiply<Format::bf16, double>(load, sm90, a, groups, stream);
  else
    r.narrow ? multiply<Format::fp16, float>(load, sm90, a, groups, stream)
             : multiply<Format::fp16, double>(load, sm90, a, groups, stream);
}

}  // namespace
}  // namespace kore_fast::covariance

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CUDA, library) {
  library.impl("covariance_update_native_", TORCH_BOX(&kore_fast::covariance::covariance_update));
}
