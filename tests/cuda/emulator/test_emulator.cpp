// Right programs go right under every schedule.
#include <cmath>
#include <set>

#include "check.h"
#include "emulator.h"
#include "samples.h"

namespace {

using namespace eqr::emu;

TEST(a_product_by_mma) {
  for (int seed = 0; seed < 3 * kSeeds; ++seed) {
    Product product;
    product.run(Mistake::kNone, seed);
    CHECK(!product.wrong(), seed, product.wrong());
  }
}

TEST(a_product_by_wgmma_through_a_ring) {
  for (int seed = 0; seed < 3 * kSeeds; ++seed) {
    Ring ring;
    ring.run(Mistake::kNone, seed);
    CHECK(!ring.wrong(), seed, ring.wrong());
  }
}

TEST(a_barrier_of_the_grid) {
  constexpr int kCtas = 6, kThreads = 64, kRounds = 5;
  for (int seed = 0; seed < kSeeds; ++seed) {
    uint32_t arrived = 0;
    std::vector<int> values(kCtas * kThreads, 0);
    launch({.ctas = kCtas, .threads = kThreads, .seed = uint64_t(seed)}, [&] {
      const int me = Emulated::cta() * kThreads + Emulated::thread();
      for (int round = 0; round < kRounds; ++round) {
        const int next = values[(me + kThreads + 1) % (kCtas * kThreads)];
        for (const bool stores : {false, true}) {
          Emulated::sync();
          if (Emulated::thread() == 0) {
            Emulated::add_release(&arrived, 1);
            while (Emulated::load_acquire(&arrived) < uint32_t(kCtas * (2 * round + 1 + stores))) Emulated::pause();
          }
          Emulated::sync();
          if (!stores) values[me] = next + 1;
        }
      }
    });
    for (const int value : values) CHECK(value == kRounds, seed, value);
  }
}

TEST(a_queue_of_work_and_a_host_that_stops_it) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    uint64_t next = 0, least = ~uint64_t(0);
    int64_t stop = 0, seen = 0;
    int looks = 0;
    std::vector<int> done(100, 0);
    const auto meanwhile = [&] { stop = ++looks > 20; };
    launch(
        {.ctas = 7, .threads = 32, .resident = 3, .shared_bytes = 128, .seed = uint64_t(seed), .meanwhile = meanwhile},
        [&] {
          auto* item = reinterpret_cast<uint64_t*>(Emulated::shared());
          for (;;) {
            if (Emulated::thread() == 0) *item = Emulated::atomic_add(&next, 1);
            Emulated::sync();
            const uint64_t mine = *item;
            Emulated::sync();
            if (mine >= done.size()) break;
            if (Emulated::thread() == 0) ++done[mine];
            Emulated::atomic_min(&least, 1000 - mine);
          }
          while (!Emulated::load_system(&stop)) Emulated::pause();
          Emulated::store_system(&seen, 1);
        });
    for (size_t i = 0; i < done.size(); ++i) CHECK(done[i] == 1, seed, i, done[i]);
    CHECK(least == 1000 - 99 && seen == 1 && looks > 20, seed, least, seen, looks);
  }
}

// The first CTA or warp to come differs from seed to seed, and one may come long before another starts.
TEST(seeds_differ_and_repeat) {
  const auto order = [](int seed) {
    std::string out;
    launch({.ctas = 2, .threads = 64, .seed = uint64_t(seed)}, [&] {
      for (int i = 0; i < 3; ++i) {
        Emulated::sync_warp();
        if (Emulated::thread() % 32 == 0) out += char('a' + 2 * Emulated::cta() + Emulated::thread() / 32);
      }
    });
    return out;
  };
  std::set<std::string> all;
  for (int seed = 0; seed < kSeeds; ++seed) {
    all.insert(order(seed));
    CHECK(order(seed) == order(seed), seed);
  }
  CHECK(all.size() >= 6, all.size());
}

TEST(clusters_load_from_each_other) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    std::vector<uint32_t> sums(8, 0);
    launch({.ctas = 8, .threads = 32, .cluster = 4, .resident = 4, .shared_bytes = 128, .seed = uint64_t(seed)}, [&] {
      auto* words = reinterpret_cast<uint32_t*>(Emulated::shared());
      words[Emulated::thread()] = uint32_t(100 * Emulated::cluster_rank() + Emulated::thread());
      Emulated::cluster_sync();
      uint32_t sum = 0;
      for (int rank = 0; rank < Emulated::cluster_size(); ++rank)
        sum += Emulated::cluster_load(words + Emulated::thread(), rank);
      if (Emulated::thread() == 5) sums[Emulated::cta()] = sum;
      Emulated::cluster_sync();
    });
    for (const uint32_t sum : sums) CHECK(sum == 600 + 4 * 5, seed, sum);
  }
}

TEST(arithmetic_is_as_on_a_gpu) {
  CHECK(Emulated::pack_bf16(1.0f, -2.0f) == 0xC0003F80);
  CHECK(Emulated::pack_bf16(1.00390625f, 1.01171875f) == 0x3F823F80);  // ties to even
  CHECK(Emulated::pack_bf16(NAN, INFINITY) == 0x7F807FFF);
  for (float x = -0.999f; x < 1; x += 0.037f) {
    const double back = std::erf(double(Emulated::erfinv(x)));
    CHECK(std::fabs(back - x) < 1e-7, x, back);
  }
  CHECK(std::fabs(Emulated::erfinv(0.99999994f) - 3.8325065f) < 1e-6, Emulated::erfinv(0.99999994f));
  CHECK(Emulated::erfinv(0) == 0 && Emulated::erfinv(1) == INFINITY && std::isnan(Emulated::erfinv(1.5f)));
  for (int i = -20; i <= 20; ++i) {
    float sine, cosine;
    const float x = float(i) / 4;
    Emulated::sincos_pi(x, &sine, &cosine);
    CHECK(std::fabs(sine - std::sin(M_PI * double(x))) < 1e-6, x, sine);
    CHECK(std::fabs(cosine - std::cos(M_PI * double(x))) < 1e-6, x, cosine);
    CHECK(i % 4 || sine == 0, x, sine);
  }
}

}  // namespace
