// The frozen-A layer's large products on NVIDIA GPUs of compute capability 8.0 and up, bf16 and fp16:
//
//   C (M, N) = P (M, K1) Q (K1, N) + s · R (M, K2) S (K2, N) [+ bias] [+ C]
//   y  = x Wᵀ + s · z Bᵀ + bias          Q = Wᵀ, S = Bᵀ: elements are neighbours along k (Major::k)
//   dx = dy W + dz A [+ the layer before's]   Q = W, S = A: neighbours along n (Major::n)
//
// One launch on the current stream, no synchronisation, no atomics: each entry of C is one thread's, whose order of
// adding depends on shapes alone. So on one path the same call gives the same bits, whatever tiles it is cut into.
//
// Schedule. The adapter's product goes first: there the scale is one multiplication of the sum, and rounds no factor.
// Then the base's product goes on in the same accumulators. Tiles are walked in bands of 8 rows of tiles, column by
// column. Edges in M, N, K1 and K2 are zeros in shared memory.
//   sm_80:  tiles of 128 × 128, 128 threads, each warp 64 × 64 by mma.sync m16n8k16; 3 stages of 32 of k by cp.async,
//           two blocks a multiprocessor. Rows that don't start on 16 bytes go through registers instead of cp.async.
//   sm_90a: clusters of two blocks, each with a tile of 128 × 256, or 128 × 128 where there are few (tile_columns);
//           persistent. One thread of each orders boxes from the copy engine: its own rows of the left factor, and its
//           half of the right one's tile for both blocks, so that a step of 64 of k reads 32 KB a block and not 48 KB
//           from the cache. Two warpgroups multiply by wgmma m64n256k16 from shared memory; 4 stages (6 of narrow
//           tiles) between them on mbarriers. While one stores, the thread orders the next tile's boxes and the other
//           warpgroup goes on.
// Lanes exchange words so that each stores 16 bytes of C; bias and C's old values are added before the one rounding.
// Hopper's path wants all rows, of C too, on 16 bytes; else it is sm_80's that runs.
// KORE_FAST_CUDA_PATH=sm80 or sm90 (where it can) forces one.
//
// Not here: z = x Aᵀ, dz = s·dy B and dB = s·dyᵀ z, which are vendor products (ops/native/frozen_lora.py). Arithmetic
// on one read of dy (T, d) for both dz and dB, which would save 2 T d bytes: a block that owns t tokens and c columns
// of dy leaves sums in fp32, T r d / c of dz and T r d / t of dB, each written and read, 8 T r d (1 / c + 1 / t) bytes.
// With a block a multiprocessor at T = 8192 and d = 4096 that is least at c = t = 512, r / 64 of what is saved: 12 µs
// are left at r = 16, 8 at r = 32 and none at r = 64, of about 720, before the launch that adds the sums. And from
// r = 180 on (780 TFLOP/s, 4.3 TB/s) each product takes longer to multiply than dy to read: a read saved would save no
// time.
//
// Accumulation and error. Products of bf16 or fp16 are exact in fp32. Tensor cores add 16 at a time to an fp32
// accumulator and cut (not round) each term below 2^-24 of the largest. One accumulator takes the whole chain, as the
// vendor's do: with S = Σ |terms| of an entry,
//   |error| ≤ (K1 + K2) 2^-23.9 S at worst, plus one rounding to C's dtype.
// In emulation, with terms of both signs: ≤ 2^-23 S beside the rounding, for sums of up to 8448 terms.
//
// speed: not measured (figures come from benchmarks/results only).

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "../common/cuda_device.cuh"
#include "../common/cuda_host.h"
#include "cuda_kernels.cuh"

namespace kore_fast::frozen_lora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr Call call{"frozen_lora_product_native_"};

template <Format F, Load L, Major O>
__global__ void __launch_bounds__(Sm80::kThreads, 2) product_sm80_kernel(Product a) {
  Device p;
  product_sm80<Device, F, L, O>(p, a);
}

template <Format F, Major O, int TN>
__global__ void __launch_bounds__(Sm90<TN>::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ Product a, const __grid_constant__ Maps<CUtensorMap> maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Device p;
  product_sm90<Device, F, O, TN>(p, a, maps);
#else
  __trap();  // use_sm90 keeps other machine code from being launched
#endif
}

// The driver's encoder of maps. Looked up, not linked: the library loads where there is no driver.
CUtensorMap map_of(Format format, const Factor& factor, int rows, int columns, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return driver == nullptr ? nullptr : reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled"));
  }();
  if (encode == nullptr)
    call.fail("the driver has no cuTensorMapEncodeTiled; update it to one for CUDA 12 or later, or set "
              "KORE_FAST_CUDA_PATH=sm80");
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, pitch = cuuint64_t(factor.pitch) * 2;
  const cuuint32_t box[2] = {kBoxColumns, cuuint32_t(box_rows)}, every[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map, format == Format::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<uint16_t*>(factor.at), sizes, &pitch, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    call.fail("cuTensorMapEncodeTiled refuses a matrix of ", rows, " × ", columns, ", ", factor.pitch,
              " elements from row to row: error ", int(result));
  return map;
}

template <Format F, Major O, int TN>
void launch_sm90(const Product& a, int processors, cudaStream_t stream) {
  using S = Sm90<TN>;
  constexpr int box_rows = kRightBoxRows<TN, O>;
  const auto right = [&](const Factor& factor, int K) {
    return O == Major::k ? map_of(F, factor, a.N, K, box_rows) : map_of(F, factor, K, a.N, box_rows);
  };
  const Maps<CUtensorMap> maps{map_of(F, a.P, a.M, a.K1, kLeftBoxRows), right(a.Q, a.K1),
                               map_of(F, a.R, a.M, a.K2, kLeftBoxRows), right(a.S, a.K2)};
  const auto kernel = product_sm90_kernel<F, O, TN>;
  constexpr int shared = S::kShared + kAlignment;
  call.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "shared memory of the product");
  const int64_t clusters = std::min<int64_t>(pair_count(a, TN), processors / S::kCluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = S::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(clusters) * S::kCluster);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  call.check(cudaLaunchKernelEx(&config, kernel, a, maps), "launch of the product");
}

template <Format F, Load L, Major O>
void launch_sm80(const Product& a, cudaStream_t stream) {
  const auto kernel = product_sm80_kernel<F, L, O>;
  constexpr int shared = Sm80::kShared + kAlignment;
  call.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "shared memory of the product");
  const int64_t tiles = int64_t(over(a.M, Sm80::kTile)) * over(a.N, Sm80::kTile);
  kernel<<<unsigned(tiles), Sm80::kThreads, shared, stream>>>(a);
  call.check(cudaGetLastError(), "launch of the product");
}

struct Choice {
  bool sm90;
  Load load;
  Major major;
};

template <Format F, Major O>
void launch(const Product& a, const Choice& choice, int processors, cudaStream_t stream) {
  if (choice.sm90)
    tile_columns(a, processors) == 256 ? launch_sm90<F, O, 256>(a, processors, stream)
                                       : launch_sm90<F, O, 128>(a, processors, stream);
  else
    choice.load == Load::async ? launch_sm80<F, Load::async, O>(a, stream) : launch_sm80<F, Load::copy, O>(a, stream);
}

// A matrix's rows in memory, if its columns (or, turned, its rows) are neighbours.
std::optional<Factor> factor_of(const Tensor& t, bool turned) {
  const int along = turned ? 0 : 1;
  if (t.size(along) > 1 && t.stride(along) != 1) return std::nullopt;
  return Factor{nullptr, t.stride(1 - along)};
}

// Everything but where the tensors lie: what meta tensors can be asked too.
struct Checked {
  Product product;
  Major major;
};

Checked check_arguments(const Tensor& C, const Tensor& P, const Tensor& Q, const Tensor& R, const Tensor& S,
                        const std::optional<Tensor>& bias, double scale, bool add) {
  const auto matrix = [&](const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns)
      call.fail(name, " has shape ", shape(t), ", want (", rows, ", ", columns, ")");
    if (t.scalar_type() != P.scalar_type()) call.fail(name, " has to have P's dtype");
  };
  if (P.dim() != 2 || R.dim() != 2 || C.dim() != 2)
    call.fail("C, P and R have shapes ", shape(C), ", ", shape(P), " and ", shape(R), ", want matrices");
  if (P.scalar_type() != ScalarType::BFloat16 && P.scalar_type() != ScalarType::Half)
    call.fail("P has to be bfloat16 or float16; use backend=\"reference\" for float32 and float64");
  const int64_t M = P.size(0), K1 = P.size(1), K2 = R.size(1), N = C.size(1);
  matrix(C, "C", M, N);
  matrix(Q, "Q", K1, N);
  matrix(R, "R", M, K2);
  matrix(S, "S", K2, N);
  if (K1 == 0 || K2 == 0) call.fail("P ", shape(P), " and R ", shape(R), " need a column at least");
  if (bias && (bias->dim() != 1 || bias->size(0) != N || (N > 1 && bias->stride(0) != 1)))
    call.fail("bias has shape ", shape(*bias), ", want (", N, ",), contiguous");
  if (bias && bias->scalar_type() != P.scalar_type()) call.fail("bias has to have P's dtype");
  if (M >= INT32_MAX / 2 || N >= INT32_MAX / 2 || K1 >= INT32_MAX / 2 || K2 >= INT32_MAX / 2)
    call.fail("a side of 2^30 or more");
  if (int64_t(over(int(M), Sm80::kTile)) * over(int(N), Sm80::kTile) >= INT32_MAX) call.fail("more than 2^31 tiles");

  Checked found{};
  Product& a = found.product;
  if (N > 1 && (C.stride(1) != 1 || (M > 1 && C.stride(0) < N)))
    call.fail("C has to be row-major without overlapping rows");
  const std::optional<Factor> p = factor_of(P, false), r = factor_of(R, false);
  if (!p || !r) call.fail("rows of P and of R have to be contiguous");
  const auto right_factors_are = [&](Major major) {
    const std::optional<Factor> q = factor_of(Q, major == Major::k), s = factor_of(S, major == Major::k);
    if (q && s) found.major = major, a.Q = *q, a.S = *s;
    return q && s;
  };
  if (!right_factors_are(Major::n) && !right_factors_are(Major::k))
    call.fail("Q and S have to be contiguous in the same way, both along rows or both along columns");
  a.P = *p;
  a.R = *r;
  a.C_row = M > 1 ? C.stride(0) : N;
  a.scale = float(scale);
  a.add = add;
  a.M = int(M), a.N = int(N), a.K1 = int(K1), a.K2 = int(K2);
  return found;
}

void product_meta(Tensor C, Tensor P, Tensor Q, Tensor R, Tensor S, std::optional<Tensor> bias, double scale,
                  bool add) {
  check_arguments(C, P, Q, R, S, bias, scale, add);
}

void product(Tensor C, Tensor P, Tensor Q, Tensor R, Tensor S, std::optional<Tensor> bias, double scale, bool add) {
  Checked checked = check_arguments(C, P, Q, R, S, bias, scale, add);
  Product& a = checked.product;
  const int device = P.get_device_index();
  const auto data = [&](const Tensor& t, const char* name) {
    if (!t.is_cuda() || t.get_device_index() != device) call.fail(name, " is not on P's device");
    return static_cast<uint16_t*>(t.data_ptr());
  };
  a.C = data(C, "C");
  a.P.at = data(P, "P");
  a.Q.at = data(Q, "Q");
  a.R.at = data(R, "R");
  a.S.at = data(S, "S");
  a.bias = bias ? data(*bias, "bias") : nullptr;
  if (a.M == 0 || a.N == 0) return;

  const auto on_16_bytes = [](const void* at, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && pitch % kChunk == 0;
  };
  a.whole = on_16_bytes(a.C, a.C_row) && a.N % kChunk == 0;
  bool aligned = true, apart = true;  // rows that start on 16 bytes; that don't overlap, as the copy engine wants them
  const auto look = [&](const Factor& factor, int columns) {
    aligned &= on_16_bytes(factor.at, factor.pitch);
    apart &= factor.pitch >= columns;
  };
  look(a.P, a.K1);
  look(a.R, a.K2);
  look(a.Q, checked.major == Major::k ? a.K1 : a.N);
  look(a.S, checked.major == Major::k ? a.K2 : a.N);

  // torch's guard restores the device as torch sees it; this library's own CUDA runtime is told separately.
  const torch::stable::accelerator::DeviceGuard guard(device);
  call.check(cudaSetDevice(device), "cudaSetDevice");
  const int processors = call.attribute(cudaDevAttrMultiProcessorCount, device);
  const bool sm90 = call.use_sm90(device, product_sm90_kernel<Format::bf16, Major::k, 256>);
  const Choice choice{sm90 && aligned && apart && a.whole, aligned ? Load::async : Load::copy, checked.major};
  const cudaStream_t stream = call.current_stream(device);
  if (P.scalar_type() == ScalarType::BFloat16)
    choice.major == Major::k ? launch<Format::bf16, Major::k>(a, choice, processors, stream)
                             : launch<Format::bf16, Major::n>(a, choice, processors, stream);
  else
    choice.major == Major::k ? launch<Format::fp16, Major::k>(a, choice, processors, stream)
                             : launch<Format::fp16, Major::n>(a, choice, processors, stream);
}

}  // namespace
}  // namespace kore_fast::frozen_lora

STABLE_TORCH_LIBRARY_IMPL(kore_fast, CUDA, library) {
  library.impl("frozen_lora_product_native_", TORCH_BOX(&kore_fast::frozen_lora::product));
}

STABLE_TORCH_LIBRARY_IMPL(kore_fast, Meta, library) {
  library.impl("frozen_lora_product_native_", TORCH_BOX(&kore_fast::frozen_lora::product_meta));
}
