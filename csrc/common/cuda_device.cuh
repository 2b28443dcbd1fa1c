// The kernels' primitives on a GPU: one inline PTX instruction each (PTX ISA 9.0). cuda_emulation.h has the same names
// for the host. Addresses of shared memory are 32-bit, as the instructions take them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace kore_fast {

extern __shared__ __align__(1024) unsigned char cuda_shared_memory[];

struct Device {
  using TensorMap = CUtensorMap;

  __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return int(blockDim.x); }
  __device__ __forceinline__ unsigned block_x() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return int(gridDim.x); }
  __device__ __forceinline__ int block_y() const { return int(blockIdx.y); }
  __device__ __forceinline__ int block_z() const { return int(blockIdx.z); }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
  __device__ __forceinline__ uint32_t count_bits(uint32_t bits) { return __popc(bits); }

  // Two floats to bf16, nearest even; the first below.
  __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }

  __device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }

  // The value of the lane whose number differs by these bits.
  __device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  // Base of dynamic shared memory, on 1024 bytes: the launch asks for 1024 bytes more than the body uses.
  __device__ __forceinline__ uint32_t shared() const {
    return (uint32_t(__cvta_generic_to_shared(cuda_shared_memory)) + 1023u) & ~1023u;
  }

  __device__ __forceinline__ void load_global16(const void* from, uint32_t (&words)[4]) {
    const uint4 value = __ldg(static_cast<const uint4*>(from));
    words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
  }
  // The same of what the kernel writes later.
  __device__ __forceinline__ void load_old16(const void* from, uint32_t (&words)[4]) {
    const uint4 value = *static_cast<const uint4*>(from);
    words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
  }
  __device__ __forceinline__ void store_global16(void* to, const uint32_t (&v)[4]) {
    *static_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
  }
  __device__ __forceinline__ void store_shared32(uint32_t at, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
  }
  __device__ __forceinline__ uint32_t load_shared32(uint32_t at) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
  }
  __device__ __forceinline__ void store_shared_double(uint32_t at, double value) {
    asm volatile("st.shared.f64 [%0], %1;" ::"r"(at), "d"(value) : "memory");
  }
  __device__ __forceinline__ double load_shared_double(uint32_t at) {
    double value;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(value) : "r"(at) : "memory");
    return value;
  }
  __device__ __forceinline__ void store_shared16(uint32_t at, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }

  // 16 bytes to shared memory, of which the first `bytes` are read and the others are zeros.
  __device__ __forceinline__ void cp_async16(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int PENDING>
  __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }

  __device__ __forceinline__ void ldmatrix(uint32_t at, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
  __device__ __forceinline__ void ldmatrix_trans(uint32_t at, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }

  template <auto FORMAT>
  __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (int(FORMAT) == 0)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __device__ __forceinline__ void barrier_init(uint32_t at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void barrier_arrive(uint32_t at) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(at) : "memory");
  }
  // Until the phase of this parity is complete. try_wait sleeps in hardware for a while by itself.
  __device__ __forceinline__ void barrier_wait(uint32_t at, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "wait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(at),
        "r"(parity)
        : "memory");
  }

  // Clusters: neighbours in x whose shared memories have the same addresses.
  __device__ __forceinline__ int cluster_rank() const {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
  }
  // All threads of the cluster; also makes barriers that were initialised before known to it and to the copy engine.
  __device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "fence.mbarrier_init.release.cluster;\n"
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
  }
  // At the barrier of this address in a block of the cluster.
  __device__ __forceinline__ void barrier_arrive_at(uint32_t at, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(at),
        "r"(rank)
        : "memory");
  }
  // Arrives, once the barrier knows of so many bytes more.
  __device__ __forceinline__ void barrier_expect(uint32_t at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  }
  // As barrier_wait, where other blocks of the cluster arrive too.
  __device__ __forceinline__ void barrier_wait_cluster(uint32_t at, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "wait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait;\n}" ::"r"(at),
        "r"(parity)
        : "memory");
  }
  // One thread orders a box of a matrix, which starts at this column and row; its bytes arrive at the barrier.
  __device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, int column, int row,
                                            uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  }
  // The same for both blocks of a cluster: one read, to the same addresses of both.
  __device__ __forceinline__ void load_tile_to_all(uint32_t to, const CUtensorMap& map, int column, int row,
                                                   uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t(3))
        : "memory");
  }
  __device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
  template <int COUNT>
  __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  }
  template <int COUNT>
  __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  }

  __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int PENDING>
  __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  }

#define KF_ROW(op, r, i)                                                                                  \
  op(r[i]), op(r[i + 1]), op(r[i + 2]), op(r[i + 3]), op(r[i + 4]), op(r[i + 5]), op(r[i + 6]), op(r[i + 7])
#define KF_ALL(op, r)                                                                                            \
  KF_ROW(op, r, 0), KF_ROW(op, r, 8), KF_ROW(op, r, 16), KF_ROW(op, r, 24), KF_ROW(op, r, 32), KF_ROW(op, r, 40), \
      KF_ROW(op, r, 48), KF_ROW(op, r, 56)
#define KF_MORE(op, r)                                                                                      \
  KF_ALL(op, r), KF_ROW(op, r, 64), KF_ROW(op, r, 72), KF_ROW(op, r, 80), KF_ROW(op, r, 88), KF_ROW(op, r, 96), \
      KF_ROW(op, r, 104), KF_ROW(op, r, 112), KF_ROW(op, r, 120)
  // Keeps the compiler from moving uses of the accumulators across a fence or a wait.
  __device__ __forceinline__ void wgmma_hold(float (&c)[64]) { asm volatile("" : KF_ALL("+f", c)::"memory"); }
  __device__ __forceinline__ void wgmma_hold(float (&c)[128]) { asm volatile("" : KF_MORE("+f", c)::"memory"); }

  // c (64 × 128 or 64 × 256 of a warpgroup) = or += A B, operands in shared memory, MN-major ("transposed") or K-major.
  template <auto FORMAT, bool A_MN = true, bool B_MN = true>
  __device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
#define KF_WGMMA(TYPE)                                                                              \
  asm volatile(                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                              \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "           \
      "%64, %65, p, 1, 1, %67, %68;\n}"                                                             \
      : KF_ALL("+f", c)                                                                             \
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_MN)), "n"(int(B_MN)))
    if constexpr (int(FORMAT) == 0)
      KF_WGMMA("bf16");
    else
      KF_WGMMA("f16");
#undef KF_WGMMA
  }
  template <auto FORMAT, bool A_MN = true, bool B_MN = true>
  __device__ __forceinline__ void wgmma(float (&c)[128], uint64_t a, uint64_t b, bool accumulate) {
#define KF_WGMMA(TYPE)                                                                              \
  asm volatile(                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "                              \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "            \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "            \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "            \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, %131, %132;\n}"                                                         \
      : KF_MORE("+f", c)                                                                            \
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_MN)), "n"(int(B_MN)))
    if constexpr (int(FORMAT) == 0)
      KF_WGMMA("bf16");
    else
      KF_WGMMA("f16");
#undef KF_WGMMA
  }
#undef KF_MORE
#undef KF_ALL
#undef KF_ROW
#endif
};

}  // namespace kore_fast
