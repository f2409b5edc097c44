// Every mistake is found: by an error that says what, or by a wrong result, under at least one of ten seeds.
#include <algorithm>
#include <string>

#include "check.h"
#include "emulator.h"
#include "samples.h"

namespace {

using namespace eqr::emu;

// The errors of ten seeds, in which `part` must be found `least` times.
template <class Run>
void expect_errors(int least, const std::string& part, const Run& run) {
  int found = 0;
  std::string other;
  for (int seed = 0; seed < kSeeds; ++seed) {
    try {
      run(seed);
    } catch (const Error& error) {
      const bool same = std::string(error.what()).find(part) != std::string::npos;
      found += same;
      if (!same) other = error.what();
    }
  }
  CHECK(found >= least, part, found, other);
}

// With the detection of races nothing is left to luck.
constexpr int at_least(int seeds) { return kFindsRaces ? kSeeds : seeds; }

template <class Sample>
int seeds_with_trouble(Mistake mistake) {
  int count = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    Sample sample;
    try {
      sample.run(mistake, seed);
      count += sample.wrong() > 0;
    } catch (const Error&) {
      ++count;
    }
  }
  return count;
}

void expect_ring_errors(int least, const std::string& part, Mistake mistake) {
  expect_errors(least, part, [&](int seed) { Ring().run(mistake, seed); });
}

template <class Sample>
void expect_trouble(int least, Mistake mistake) {
  const int seeds = seeds_with_trouble<Sample>(mistake);
  CHECK(seeds >= least, int(mistake), seeds);
}

TEST(missing_barriers_and_waits_give_wrong_products) {
  expect_trouble<Product>(at_least(5), Mistake::kNoSync);
  expect_trouble<Product>(at_least(2), Mistake::kNoSyncBeforeReuse);
  expect_trouble<Product>(kSeeds, Mistake::kNoCopyWait);
}

TEST(mistakes_with_wgmma) {
  expect_ring_errors(kSeeds, "no async_fence", Mistake::kNoFence);
  expect_ring_errors(kSeeds, "no wgmma_fence", Mistake::kNoFenceOfRegisters);
  expect_ring_errors(kSeeds, "before the wgmma_wait", Mistake::kStoreBeforeWait);
  expect_ring_errors(kSeeds, "does hold with accumulators", Mistake::kHoldBeforeWait);
  expect_ring_errors(kSeeds, "swizzle", Mistake::kSwizzle);
  expect_ring_errors(kSeeds, "another warp of its warpgroup", Mistake::kWarpsDiffer);
  expect_trouble<Ring>(kSeeds, Mistake::kReadBeforeWait);
  expect_trouble<Ring>(kSeeds, Mistake::kWrongStride);
}

TEST(mistakes_with_barriers_in_shared_memory) {
  expect_trouble<Ring>(kSeeds, Mistake::kWrongParity);
  expect_trouble<Ring>(at_least(5), Mistake::kNoEmptyWait);
  expect_trouble<Ring>(at_least(5), Mistake::kTooFewBytes);
  expect_trouble<Ring>(at_least(5), Mistake::kTooManyArrivals);
  expect_ring_errors(kSeeds, "barrier_init_done", Mistake::kNoInitDone);
  expect_trouble<Ring>(at_least(2), Mistake::kNoClusterSync);
  expect_ring_errors(at_least(2), "which has ended", Mistake::kLeavesEarly);

  const auto with_barrier = [](int count, void (*use)(uint64_t*)) {
    return [=](int seed) {
      launch({.threads = 32, .shared_bytes = 128, .seed = uint64_t(seed)}, [&] {
        auto* barrier = reinterpret_cast<uint64_t*>(Emulated::shared());
        if (Emulated::thread() == 0 && count) Emulated::barrier_init(barrier, count);
        Emulated::sync();
        if (Emulated::thread() == 0) use(barrier);
      });
    };
  };
  expect_errors(kSeeds, "not initialised", with_barrier(0, [](uint64_t* b) { Emulated::barrier_wait(b, 0); }));
  expect_errors(kSeeds, "deadlock", with_barrier(1, [](uint64_t* b) { Emulated::barrier_wait(b, 0); }));
  expect_errors(kSeeds, "expects -16", with_barrier(1, [](uint64_t* b) { Emulated::barrier_arrive_expect(b, -16); }));
  expect_errors(kSeeds, "have arrived already", with_barrier(1, [](uint64_t* b) {
                  Emulated::barrier_arrive_expect(b, 16);
                  Emulated::barrier_arrive_expect(b, 16);
                }));
  expect_errors(kSeeds, "twice", with_barrier(1, [](uint64_t* b) { Emulated::barrier_init(b, 1); }));
  // Who looks for a phase after the next one is over too waits for ever.
  expect_errors(kSeeds, "deadlock", with_barrier(1, [](uint64_t* b) {
                  Emulated::barrier_arrive(b, 0);
                  Emulated::barrier_arrive(b, 0);
                  Emulated::barrier_wait(b, 0);
                }));
}

TEST(mistakes_in_a_warp) {
  const auto run = [](void (*body)(int)) {
    return [=](int seed) {
      launch({.threads = 64, .shared_bytes = 1024, .seed = uint64_t(seed)}, [&] { body(Emulated::thread()); });
    };
  };
  expect_errors(kSeeds, "of its warp is at", run([](int thread) {
                  if (thread == 40) {
                    Emulated::shuffle_xor(1, 1);
                  } else {
                    Emulated::sync_warp();
                  }
                }));
  expect_errors(kSeeds, "of its warp is at shuffle_xor(",
                run([](int thread) { Emulated::shuffle_xor(1, 1 + (thread == 3)); }));
  expect_errors(kSeeds, "sync_warp", run([](int thread) {
                  if (thread != 7) Emulated::sync_warp();
                }));
  expect_errors(kSeeds, "in a warpgroup that is not whole", run([](int) { Emulated::wgmma_fence(); }));
  expect_errors(kSeeds, "multiple of 16", run([](int) {
                  uint32_t out[4];
                  Emulated::load_matrices(out, Emulated::shared() + 8);
                }));
}

TEST(mistakes_with_barriers) {
  const auto run = [](void (*body)(int)) {
    return [=](int seed) { launch({.threads = 128, .seed = uint64_t(seed)}, [&] { body(Emulated::thread()); }); };
  };
  expect_errors(kSeeds, "threads 0 to 63: waits at sync\n", run([](int thread) {
                  if (thread < 64) {
                    Emulated::sync();
                  } else {
                    Emulated::sync_some(1, 128);
                  }
                }));
  expect_errors(kSeeds, "sync_some(1, ", run([](int thread) { Emulated::sync_some(1, thread < 64 ? 128 : 96); }));
  expect_errors(kSeeds, "no such barrier", run([](int) { Emulated::sync_some(16, 128); }));
  expect_errors(kSeeds, "barrier 2: 96 threads have come", run([](int thread) {
                  if (thread < 96) Emulated::sync_some(2, 128);
                }));
  expect_errors(kSeeds, "only pause", run([](int) {
                  uint32_t never = 0;
                  while (!Emulated::load_acquire(&never)) Emulated::pause();
                }));
  expect_errors(1, "again and again", [](int seed) {
    if (seed) return;
    uint32_t never = 0;
    launch({.threads = 32}, [&] {
      while (!Emulated::load_acquire(&never)) continue;
    });
  });
  // Two CTAs that need each other, and only one of them runs.
  expect_errors(kSeeds, "have not started", [](int seed) {
    uint32_t arrived = 0;
    launch({.ctas = 2, .threads = 32, .resident = 1, .seed = uint64_t(seed)}, [&] {
      if (Emulated::thread() == 0) Emulated::add_release(&arrived, 1);
      while (Emulated::load_acquire(&arrived) < 2) Emulated::pause();
    });
  });
}

TEST(mistakes_with_memory) {
  const auto run = [](void (*body)(char*)) {
    return [=](int seed) {
      launch({.ctas = 2, .threads = 32, .shared_bytes = 256, .seed = uint64_t(seed)},
             [&] { body(Emulated::shared()); });
    };
  };
  alignas(16) static float global[8] = {};
#if !defined(EQR_SANITIZED)
  expect_errors(kSeeds, "out of bounds: at byte 2", run([](char* shared) { shared[256 + Emulated::thread()] = 1; }));
  expect_errors(kSeeds, "out of bounds: at byte -", run([](char* shared) { shared[-1 - Emulated::thread()] = 1; }));
#endif
  expect_errors(kSeeds, "not inside", run([](char* shared) { Emulated::copy_async(shared + 256, global); }));
  expect_errors(kSeeds, "multiple of 16", run([](char* shared) { Emulated::copy_async(shared + 8, global); }));
  expect_errors(kSeeds, "multiple of 16",
                run([](char* shared) { Emulated::copy_async(shared, reinterpret_cast<const char*>(global) + 4); }));
  // Shared memory is NaN at first, also where an earlier CTA ran.
  for (int seed = 0; seed < kSeeds; ++seed)
    launch({.ctas = 3, .threads = 32, .resident = 1, .shared_bytes = 256, .seed = uint64_t(seed)}, [&] {
      auto* x = reinterpret_cast<float*>(Emulated::shared()) + Emulated::thread();
      CHECK(*x != *x);
      *x = 1;
    });
}

TEST(reading_after_a_peer_has_ended) {
  expect_errors(2, "which has ended", [](int seed) {
    launch({.ctas = 2, .threads = 32, .cluster = 2, .shared_bytes = 128, .seed = uint64_t(seed)}, [&] {
      auto* word = reinterpret_cast<uint32_t*>(Emulated::shared());
      if (Emulated::thread() == 0) *word = 1;
      Emulated::cluster_sync();
      Emulated::cluster_load(word, 1 - Emulated::cluster_rank());
    });
  });
}

TEST(work_under_way_at_the_end) {
  alignas(16) static float global[8] = {};
  expect_errors(kSeeds, "has not waited for", [](int seed) {
    launch({.threads = 32, .shared_bytes = 512, .seed = uint64_t(seed)}, [&] {
      Emulated::copy_async(Emulated::shared() + 16 * Emulated::thread(), global);
      Emulated::copy_commit();
    });
  });
}

TEST(an_exception_in_a_body_comes_out) {
  bool caught = false;
  try {
    launch({.threads = 32}, [] {
      Emulated::sync_warp();
      if (Emulated::thread() == 9) throw std::runtime_error("nine");
    });
  } catch (const std::runtime_error& error) {
    caught = std::string(error.what()) == "nine";
  }
  CHECK(caught);
}

}  // namespace
