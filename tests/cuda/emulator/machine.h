// The state of a launch on the host: CTAs, warps, threads, and who goes on next.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fibers.h"
#include "races.h"

namespace eqr::emu {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
constexpr int kWindow = 1024;            // where shared memory starts for `shared_address`: not at 0
constexpr int kMostShared = 232448;      // bytes of dynamic shared memory that a CTA of sm_90 can have
constexpr unsigned char kPoison = 0xFF;  // NaN in bf16 and in fp32

struct Kind {
  const char* name;
  int numbers;                 // that its text shows
  bool without_ended = false;  // lanes that have ended need not come
};
struct Operation {
  const Kind* kind = nullptr;
  int64_t numbers[3] = {};
  bool operator==(const Operation&) const = default;
  std::string text() const;
};

struct Random {
  uint64_t state;
  uint64_t next();
  uint32_t below(uint32_t n) { return uint32_t((next() >> 32) * n >> 32); }
};

enum class Schedule { kShuffled, kGreedy, kStarving, kForwards, kBackwards, kCount };
enum class Lateness { kRandom, kAtOnce, kAsLateAsAllowed, kCount };  // of asynchronous work

struct Cta;
struct Warp;

struct AsyncCopy {
  char* to;
  const char* from;
  int64_t group;
  bool done = false;
};

struct Thread {
  enum State : uint8_t { kReady, kRunning, kPaused, kWaiting, kEnded };
  Fiber fiber;
  Cta* cta;
  Warp* warp;
  int index;
  State state = kReady;
  Operation at;
  std::vector<AsyncCopy> copies;
  int64_t copy_group = 0;  // the open one
  races::View view;

  int lane() const { return index % kLanes; }
  std::string name() const;
};

// Accumulators that wgmma operations under way will change: the registers hold poison meanwhile.
struct InFlight {
  float* registers[kLanes];
  int count;  // of each lane
  int64_t group;
  std::vector<float> values;  // [kLanes][count]
};
struct Wgmma {
  uint64_t a, b;
  int n;
  InFlight* c;
  int64_t group;
};

struct Warp {
  Cta* cta;
  int index;
  uint32_t ready = 0, ended = 0;
  size_t place = 0;  // among the warps with ready lanes

  // Where the lanes meet.
  Operation at;
  uint32_t arrived = 0, met = 0;
  void* arguments[kLanes];
  void (*complete)(Warp&);

  bool fenced = false;
  int64_t wgmma_group = 0;
  std::deque<Wgmma> wgmmas;        // to do
  std::vector<Wgmma> done_wgmmas;  // that no wait has covered
  std::vector<std::unique_ptr<InFlight>> in_flight;
};

// What the four warps of a warpgroup have done together: each must do the same, at its own pace.
struct Warpgroup {
  std::deque<Operation> log;
  int64_t forgotten = 0, at[4] = {};
};

struct Gathering {  // at a CTA's or a cluster's barrier
  int64_t threads = 0;
  int64_t arrived = 0;
  std::vector<std::pair<Warp*, uint32_t>> waiting;
};

struct Mbarrier {
  const Thread* initialised_by = nullptr;
  bool published = false;
  std::vector<Thread*> waiting;
  races::Clock told, completed;
};

struct Cluster {
  int live = 0;  // threads
  Gathering gathering;
};

struct Cta {
  int index, rank;
  Cluster* cluster;
  std::vector<Cta*> peers;  // by rank
  bool ended = false;
  int live = 0;  // threads
  char* shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::deque<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Gathering gatherings[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  std::vector<char> seen;                  // shared memory as bulk copies and wgmma see it
  std::vector<races::Cell> cells;
  uint32_t bulk_tick = 0;
};

struct BulkCopy {
  Cta* to;
  uint32_t offset, barrier;
  const char* from;
  int bytes;
  uint32_t tick;
};

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& body);
  ~Machine();
  void run();

  // From a thread of the launch:
  // Waits for the other lanes of the warp; the last to come calls `complete`, which wakes those in `met` or has it done
  // later.
  void meet(const Operation& operation, void* argument, void (*complete)(Warp&));
  void wait(const Operation& operation);  // until somebody wakes this thread
  void pause();
  void maybe_switch();                               // to another thread that can go on
  void look();                                       // the same, where the thread may look again and again
  [[noreturn]] void stop(const std::string& error);  // as a throw does, where the compiler expects none

  // From anywhere:
  void wake(Thread& thread);
  void wake(Warp& warp, uint32_t lanes);
  void gather(Gathering& gathering, Warp& warp, int64_t all);  // those in `met`
  void open(Gathering& gathering);
  bool find_shared(const void* p, Cta** cta, int64_t* offset) const;  // false for other memory
  uint32_t offset_of(const Cta& cta, const void* p, int64_t bytes, const char* what) const;
  int ctas() const { return launch_.ctas; }
  int shared_bytes() const { return launch_.shared_bytes; }

  Thread* current = nullptr;
  Random random;
  Schedule schedule;
  Lateness lateness;
  std::vector<BulkCopy> bulk_copies;
  uint64_t progress = 0;  // anything but waiting and looking

 private:
  static void entry(void* thread);
  void start_clusters();
  void start_cta(int index, int rank, Cluster* cluster);
  void end_thread(Thread& thread);
  void end_cta(Cta& cta);
  void idle();
  void asynchronous_step();
  Thread& pick();
  Warp& pick_warp();
  void switch_out();
  std::string table() const;

  const Launch launch_;
  const std::function<void()>& body_;
  std::vector<std::unique_ptr<Cta>> ctas_;  // by index, null before their start
  std::deque<Cluster> clusters_;
  std::vector<int> queue_;  // clusters that have not started, the next one last
  char* slots_ = nullptr;   // memory of the CTAs that run
  size_t slot_bytes_, slot_count_;
  std::vector<char*> free_slots_;
  std::vector<Cta*> in_slot_;
  std::vector<Warp*> ready_;
  std::vector<Thread*> paused_;
  Warp *favourite_ = nullptr, *last_ = nullptr;
  bool by_cta_ = false;
  int running_ = 0;  // CTAs
  int idle_rounds_ = 0;
  uint64_t progress_seen_ = 0, picks_ = 0, looks_ = 0, progress_looked_ = 0;
  std::exception_ptr error_;
};

extern Machine* machine;  // of the launch under way

// report.cpp
[[noreturn]] void fail(const std::string& what);  // names the thread, if one is running
std::string code_text(const void* code);          // where in the program, if anywhere

// barriers.cpp
void sync_ended(Cta& cta);  // opens barriers that waited for a thread that has ended
void bytes_came(Cta& cta, uint32_t barrier, int bytes, uint32_t tick);
std::string mbarrier_text(const Cta& cta, uint32_t offset);
// copies.cpp
void copy_one(Thread& thread);  // one of its copies under way, if any
void copy_piece(size_t which);  // of the bulk copies under way
std::vector<char>& seen_by_async(Cta& cta);
void check_ended(const Thread& thread);
// wgmma.cpp
void wgmma_one(Warp& warp);  // the oldest under way, if any
void check_ended(const Warp& warp);

}  // namespace eqr::emu
