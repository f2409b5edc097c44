// What the CUDA kernels ask of the machine, one thin function for each instruction. A kernel body takes this struct as
// its template argument `Be`; tests/cuda/emulator/emulator.h has another of the same interface that runs bodies on the
// host.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define EQR_DEVICE __device__ __forceinline__
#define EQR_HOST_DEVICE __host__ __device__ inline
#else
#define EQR_DEVICE inline
#define EQR_HOST_DEVICE inline
#endif

#define EQR_UNROLL _Pragma("unroll")
#if defined(__CUDACC__)
#define EQR_NO_UNROLL _Pragma("unroll 1")
#else
#define EQR_NO_UNROLL
#endif

#if defined(__CUDACC__)
namespace eqr::cuda {

struct Device {
  // The thread among its CTA's, the CTA among the grid's.
  // (Read anew each time: a register less through the products.)
  EQR_DEVICE static int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
  }
  EQR_DEVICE static int cta() { return int(blockIdx.x); }
  EQR_DEVICE static int ctas() { return int(gridDim.x); }

  // Dynamic shared memory, at a multiple of 128 bytes.
  EQR_DEVICE static char* shared() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
  }
  EQR_DEVICE static uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

  EQR_DEVICE static void sync() { __syncthreads(); }
  // Keeps the compiler from moving loads ahead, where the registers are needed for other things.
  EQR_DEVICE static void keep_order() { asm volatile("" ::: "memory"); }
  // Of which the compiler knows nothing: what is computed from it stays in the loop, and takes no register outside.
  EQR_DEVICE static uint64_t opaque(uint64_t value) {
    asm volatile("" : "+l"(value));
    return value;
  }
  // `threads` (a multiple of 32) of the CTA, those that name the same `id` (1..15).
  EQR_DEVICE static void sync_some(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
  }
  EQR_DEVICE static void sync_warp() { __syncwarp(); }
  EQR_DEVICE static float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

  // Global memory, seen by the whole device.
  EQR_DEVICE static uint64_t atomic_add(uint64_t* p, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
  }
  EQR_DEVICE static uint64_t atomic_min(uint64_t* p, uint64_t value) {
    return atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
  }
  EQR_DEVICE static uint64_t load_relaxed(const uint64_t* p) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
  }
  // A barrier of the grid is built of these two. `add_release` after a `sync` publishes what the CTA has written.
  EQR_DEVICE static void add_release(uint32_t* p, uint32_t value) {
    asm volatile("fence.acq_rel.gpu;\n\tred.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
  }
  EQR_DEVICE static uint32_t load_acquire(const uint32_t* p) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n\tfence.acq_rel.gpu;" : "=r"(value) : "l"(p) : "memory");
    return value;
  }
  // In every loop that waits for another CTA.
  EQR_DEVICE static void pause() { __nanosleep(20); }

  // Words that the host reads and writes meanwhile.
  EQR_DEVICE static int64_t load_system(const int64_t* p) {
    int64_t value;
    asm volatile("ld.relaxed.sys.global.s64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
  }
  EQR_DEVICE static void store_system(int64_t* p, int64_t value) {
    asm volatile("st.relaxed.sys.global.s64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
  }

  // Tensor cores by warps. Lane l has group g = l / 4 and place t = l % 4.
  // Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned).
  // out[i] holds of matrix i the elements (row g, columns 2t and 2t + 1), or transposed (rows 2t, 2t + 1, column g).
  EQR_DEVICE static void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
  EQR_DEVICE static void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
  // c [16, 8] += a [16, 16] b [16, 8], bf16 into fp32. c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1);
  // a: pairs along k at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b0, b1: pairs along k at (2t, g), (2t + 8,
  // g).
  EQR_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  // Asynchronous copies of 16 bytes by the calling thread; `copy_wait<n>` leaves its last n groups under way.
  EQR_DEVICE static void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
  }
  EQR_DEVICE static void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int n>
  EQR_DEVICE static void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
  }

  // Two floats rounded to bf16, `low` in the low half.
  EQR_DEVICE static uint32_t pack_bf16(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
  }

  EQR_DEVICE static float rsqrt(float x) { return rsqrtf(x); }
  EQR_DEVICE static float log(float x) { return logf(x); }
  EQR_DEVICE static float sqrt(float x) { return sqrtf(x); }
  EQR_DEVICE static float erfinv(float x) { return erfinvf(x); }
  EQR_DEVICE static void sincos_pi(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }
  // To about 2^-21 of the result.
  EQR_DEVICE static float rough_exp(float x) { return __expf(x); }
  EQR_DEVICE static float rough_divide(float x, float y) { return __fdividef(x, y); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Clusters. A rank is a CTA's place in its cluster.
  EQR_DEVICE static int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
  }
  EQR_DEVICE static int cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return int(size);
  }
  // All threads of all CTAs of the cluster.
  EQR_DEVICE static void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
  }
  // The word at the same place in the shared memory of the CTA `rank`.
  EQR_DEVICE static uint32_t cluster_load(const uint32_t* p, int rank) {
    uint32_t address, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
  }

  // Barriers in shared memory: a phase is over when `count` have arrived and all expected bytes have come.
  EQR_DEVICE static void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  }
  // After the last `barrier_init`, before a `cluster_sync`.
  EQR_DEVICE static void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  EQR_DEVICE static void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }
  // At the same place in the CTA `rank` of the cluster.
  EQR_DEVICE static void barrier_arrive(uint64_t* barrier, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
  }
  // Until the phase of this parity (0 for the first) is over.
  EQR_DEVICE static void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n\t.reg .pred done;\nWAIT:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra WAIT;\n\t}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
  }

  // Copies `bytes` (a multiple of 16) to the same place in each CTA of `ranks` (a bit each), and counts them there on
  // the barrier at the same place.
  EQR_DEVICE static void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, uint32_t ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(uint16_t(ranks))
        : "memory");
  }
  // After ordinary stores to shared memory that `wgmma` reads next, in every thread that stored, before a barrier.
  EQR_DEVICE static void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // Tensor cores by warpgroups of 128 threads: c [64, n] += a [64, 16] b [16, n], bf16 into fp32, a and b in shared
  // memory behind matrix descriptors without swizzle, both with k contiguous. Warp w of the group holds rows
  // 16 w .. 16 w + 15 as `mma` does, columns 8 j .. 8 j + 7 in c[j].
  EQR_DEVICE static void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  EQR_DEVICE static void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int n>
  EQR_DEVICE static void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
  }
  template <int n>
  EQR_DEVICE static void wgmma(float (&c)[n / 8][4], uint64_t a, uint64_t b);
  // Before the first product into `c` and behind the wait for the last: the compiler knows nothing of a product under
  // way and would move what it does with these registers.
  template <int n>
  EQR_DEVICE static void hold(float (&c)[n][4]) {
    EQR_UNROLL
    for (int j = 0; j < n; ++j) asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
  }

  // Registers of each thread of the warpgroup, from here on.
  template <int n>
  EQR_DEVICE static void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
  }
  template <int n>
  EQR_DEVICE static void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
  }
#endif
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EQR_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
template <>
EQR_DEVICE void Device::wgmma<88>(float (&c)[11][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n88k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43}, %44, %45, 1, 1, 1, 0, 0;"
      : EQR_C4(0), EQR_C4(1), EQR_C4(2), EQR_C4(3), EQR_C4(4), EQR_C4(5), EQR_C4(6), EQR_C4(7), EQR_C4(8), EQR_C4(9),
        EQR_C4(10)
      : "l"(a), "l"(b));
}
template <>
EQR_DEVICE void Device::wgmma<48>(float (&c)[6][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %24, %25, 1, 1, 1, 0, "
      "0;"
      : EQR_C4(0), EQR_C4(1), EQR_C4(2), EQR_C4(3), EQR_C4(4), EQR_C4(5)
      : "l"(a), "l"(b));
}
#undef EQR_C4
#endif

}  // namespace eqr::cuda
#endif
