// Runs bodies of CUDA kernels on the host. `Emulated` has the interface of `eqr::cuda::Device`; every CUDA thread is a
// fiber, and `seed` chooses who runs ahead of whom and how late asynchronous work is done. Shared memory starts as NaN.
// What is wrong on a GPU but might go well there by luck throws: see `Error`.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

namespace eqr::emu {

struct Launch {
  int ctas = 1;
  int threads = 32;  // of each CTA
  int cluster = 1;   // CTAs
  int resident = 0;  // CTAs that run at a time, a multiple of `cluster`; 0 for all
  int shared_bytes = 0;
  uint64_t seed = 0;                  // ten seeds in a row try every schedule and every lateness
  std::function<void()> meanwhile{};  // what the host does, called now and then
};

// Whether races in shared memory are found whatever the schedule: see races.h.
#if defined(EQR_RACES)
constexpr bool kFindsRaces = true;
#else
constexpr bool kFindsRaces = false;
#endif

// Deadlock, misuse of an instruction, memory out of bounds: with thread, warp and CTA.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `body` in every thread of the grid; returns when all have ended, or throws.
void launch(const Launch& shape, const std::function<void()>& body);

struct Emulated {
  static int thread();
  static int cta();
  static int ctas();
  static char* shared();
  static uint32_t shared_address(const void* p);

  static void sync();
  static void keep_order();
  static uint64_t opaque(uint64_t value);
  static void sync_some(int id, int threads);
  static void sync_warp();
  static float shuffle_xor(float value, int mask);

  static uint64_t atomic_add(uint64_t* p, uint64_t value);
  static uint64_t atomic_min(uint64_t* p, uint64_t value);
  static uint64_t load_relaxed(const uint64_t* p);
  static void add_release(uint32_t* p, uint32_t value);
  static uint32_t load_acquire(const uint32_t* p);
  static void pause();
  static int64_t load_system(const int64_t* p);
  static void store_system(int64_t* p, int64_t value);

  static void load_matrices(uint32_t (&out)[4], const void* row);
  static void load_matrices_transposed(uint32_t (&out)[4], const void* row);
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

  static void copy_async(void* shared, const void* global);
  static void copy_commit();
  template <int n>
  static void copy_wait() {
    copy_wait(n);
  }

  static uint32_t pack_bf16(float low, float high);
  static float rsqrt(float x);
  static float log(float x);
  static float sqrt(float x);
  static float erfinv(float x);
  static void sincos_pi(float x, float* sine, float* cosine);
  static float rough_exp(float x);
  static float rough_divide(float x, float y);

  static int cluster_rank();
  static int cluster_size();
  static void cluster_sync();
  static uint32_t cluster_load(const uint32_t* p, int rank);

  static void barrier_init(uint64_t* barrier, int count);
  static void barrier_init_done();
  static void barrier_arrive_expect(uint64_t* barrier, int bytes);
  static void barrier_arrive(uint64_t* barrier, int rank);
  static void barrier_wait(uint64_t* barrier, uint32_t parity);

  static void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, uint32_t ranks);
  static void async_fence();

  static void wgmma_fence();
  static void wgmma_commit();
  template <int n>
  static void wgmma_wait() {
    wgmma_wait(n);
  }
  template <int n>
  static void wgmma(float (&c)[n / 8][4], uint64_t a, uint64_t b) {
    static_assert(n >= 8 && n <= 256 && n % 8 == 0);
    wgmma(c[0], n, a, b);
  }
  template <int n>
  static void hold(float (&c)[n][4]) {
    hold(c[0]);
  }

  template <int n>
  static void fewer_registers() {
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    set_registers(n, false);
  }
  template <int n>
  static void more_registers() {
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    set_registers(n, true);
  }

 private:
  static void copy_wait(int groups);
  static void wgmma_wait(int groups);
  static void wgmma(float* c, int n, uint64_t a, uint64_t b);
  static void hold(const float* c);
  static void set_registers(int n, bool more);
};

}  // namespace eqr::emu
