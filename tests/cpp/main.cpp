// Runs the registered tests: all of them, or those whose names contain one of the arguments. An argument -part leaves
// out those whose names contain the part.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <vector>

#include "check.h"

namespace eqr::test {
namespace {

struct Case {
  const char* name;
  void (*run)();
};

struct Skipped {
  std::string reason;
};

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

std::mutex printing;
std::atomic<int> failures{0};
constexpr int kPrinted = 20;  // of each test's failures

bool wanted(const char* name, int argc, char** argv) {
  bool all = true, named = false;
  for (int i = 1; i < argc; ++i) {
    const bool leave_out = argv[i][0] == '-', found = std::strstr(name, argv[i] + leave_out);
    if (leave_out && found) return false;
    if (leave_out) continue;
    all = false;
    named = named || found;
  }
  return all || named;
}

}  // namespace

Registrar::Registrar(const char* name, void (*run)()) { cases().push_back({name, run}); }

void failed(const char* file, int line, const std::string& what) {
  if (failures++ >= kPrinted) return;
  const std::lock_guard lock(printing);
  std::printf("  %s:%d: %s\n", file, line, what.c_str());
}

void skip(const std::string& reason) { throw Skipped{reason}; }

int run_all(int argc, char** argv) {
  int ran = 0, broken = 0, skipped = 0;
  for (const Case& test : cases()) {
    if (!wanted(test.name, argc, argv)) continue;
    failures = 0;
    std::string note;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
      ++ran;
    } catch (const Skipped& reason) {
      ++skipped;
      note = ", " + reason.reason;
    } catch (const std::exception& error) {
      ++ran;
      failed(test.name, 0, std::string("threw ") + error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    broken += failures > 0;
    const char* verdict = failures ? "FAILED " : note.empty() ? "ok     " : "skipped";
    std::printf("%s %6.2f s  %s%s\n", verdict, seconds, test.name, note.c_str());
    std::fflush(stdout);
  }
  std::printf("%d tests ran, %d failed, %d skipped\n", ran, broken, skipped);
  return broken || !ran;
}

}  // namespace eqr::test

int main(int argc, char** argv) { return eqr::test::run_all(argc, argv); }
