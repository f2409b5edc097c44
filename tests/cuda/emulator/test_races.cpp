// Races that no schedule need show, because the lanes of a warp happen to wait for each other or the values are right.
#include <string>

#include "check.h"
#include "emulator.h"
#include "samples.h"

namespace {

using namespace eqr::emu;

// The error of a launch of 64 threads, or nothing.
std::string trouble(int seed, const std::function<void(int thread, uint32_t* words)>& body, int threads = 64) {
  if (!kFindsRaces) eqr::test::skip("built without EQR_RACES");
  try {
    launch({.threads = threads, .shared_bytes = 8192, .seed = uint64_t(seed)},
           [&] { body(Emulated::thread(), reinterpret_cast<uint32_t*>(Emulated::shared())); });
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(a_store_that_a_lane_of_the_warp_reads) {
  for (int seed = 0; seed < kSeeds; ++seed)
    for (const bool right : {false, true}) {
      const std::string error = trouble(seed, [&](int thread, uint32_t* words) {
        for (int i = 0; i < 4; ++i) words[4 * thread + i] = 0;
        if (right) Emulated::sync_warp();
        uint32_t out[4];
        Emulated::load_matrices(out, words + (thread ^ 1) * 4);
      });
      CHECK(right ? error.empty() : has(error, "loads what thread"), seed, error);
    }
}

TEST(a_store_to_what_others_have_read) {
  for (int seed = 0; seed < kSeeds; ++seed)
    for (const bool right : {false, true}) {
      const std::string error = trouble(seed, [&](int thread, uint32_t* words) {
        words[thread] = 7;
        Emulated::sync();
        const uint32_t other = words[thread ^ 32];
        if (right) Emulated::sync();
        words[thread] = other;
      });
      CHECK(right ? error.empty() : has(error, "race: "), seed, error);
    }
}

TEST(a_fence_that_one_thread_forgets) {
  for (int seed = 0; seed < kSeeds; ++seed)
    for (const int forgets : {-1, 77}) {
      const std::string error = trouble(
          seed,
          [&](int thread, uint32_t* words) {
            for (int i = thread; i < 2048; i += 128) words[i] = 0;
            if (thread != forgets) Emulated::async_fence();
            Emulated::sync();
            float c[1][4] = {};
            const uint64_t matrix = Emulated::shared_address(words) >> 4 | uint64_t(8) << 16 | uint64_t(16) << 32;
            Emulated::wgmma_fence();
            Emulated::wgmma<8>(c, matrix, matrix);
            Emulated::wgmma_commit();
            Emulated::wgmma_wait<0>();
            CHECK(c[0][0] == 0);
          },
          128);
      CHECK(forgets < 0 ? error.empty() : has(error, "thread 77 of CTA 0 stored with no async_fence"), seed, error);
    }
}

TEST(a_bulk_copy_over_what_others_read) {
  alignas(16) static uint32_t global[64] = {};
  for (int seed = 0; seed < kSeeds; ++seed)
    for (const bool right : {false, true}) {
      const std::string error = trouble(seed, [&](int thread, uint32_t* words) {
        auto* full = reinterpret_cast<uint64_t*>(words + 1024);
        if (thread == 0) {
          Emulated::barrier_init(full, 1);
          Emulated::barrier_init_done();
        }
        Emulated::sync();
        for (int round = 0; round < 2; ++round) {
          if (thread == 0) {
            Emulated::barrier_arrive_expect(full, 256);
            Emulated::copy_bulk(words, global, 256, full, 1);
          }
          Emulated::barrier_wait(full, uint32_t(round));
          CHECK(words[thread] == 0 || !right);
          if (right) Emulated::sync();
        }
      });
      CHECK(right ? error.empty() : !error.empty(), seed, error);
    }
}

TEST(memory_of_another_place) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const auto body = [](int thread, uint32_t* words) {
      auto* bytes = reinterpret_cast<char*>(words);
      if (thread == 5) *reinterpret_cast<uint64_t*>(bytes + 4) = 0;
    };
    CHECK(has(trouble(seed, body), "not at a multiple"), seed, trouble(seed, body));
    const auto beyond = [](int thread, uint32_t* words) {
      if (thread == 5 && words[2048] == 0) Emulated::sync_warp();
    };
    CHECK(has(trouble(seed, beyond), "loads out of bounds: at byte 8192"), seed, trouble(seed, beyond));
  }
}

}  // namespace
