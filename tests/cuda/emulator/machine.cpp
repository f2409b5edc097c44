#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace eqr::emu {

Machine* machine = nullptr;

namespace {

constexpr int kGuardZone = 4096;  // poisoned bytes before and behind a CTA's shared memory

#if defined(__SANITIZE_ADDRESS__)
void forbid(const char* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
void allow(const char* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
void forbid(const char*, size_t) {}
void allow(const char*, size_t) {}
#endif

}  // namespace

void launch(const Launch& shape, const std::function<void()>& body) {
  if (machine) throw Error("a launch inside a launch");
  struct Reset {
    ~Reset() { machine = nullptr; }
  } reset;
  Machine here(shape, body);
  machine = &here;
  here.run();
}

Machine::Machine(const Launch& launch, const std::function<void()>& body)
    : random{launch.seed * 0x2545F4914F6CDD1D + 1},
      schedule(Schedule(launch.seed % uint64_t(Schedule::kCount))),
      lateness(Lateness(launch.seed % uint64_t(Lateness::kCount))),
      launch_(launch),
      body_(body) {
  const Launch& l = launch_;
  if (l.ctas < 1 || l.threads < 1 || l.threads > 1024 || l.cluster < 1 || l.cluster > 16 || l.ctas % l.cluster ||
      l.resident < 0 || l.resident % l.cluster || l.shared_bytes < 0 || l.shared_bytes > kMostShared)
    throw Error("no such launch: " + std::to_string(l.ctas) + " CTAs of " + std::to_string(l.threads) +
                " threads in clusters of " + std::to_string(l.cluster) + ", " + std::to_string(l.resident) +
                " resident, " + std::to_string(l.shared_bytes) + " bytes of shared memory");
  by_cta_ = random.below(2);
  ctas_.resize(l.ctas);
  slot_count_ = size_t(std::min(l.resident ? l.resident : l.ctas, l.ctas));
  slot_bytes_ = size_t(l.shared_bytes + 1023) / 1024 * 1024 + 2 * kGuardZone;
  void* memory = mmap(nullptr, slot_count_ * slot_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  slots_ = static_cast<char*>(memory);
  std::memset(slots_, kPoison, slot_count_ * slot_bytes_);
  for (size_t i = 0; i < slot_count_; ++i) free_slots_.push_back(slots_ + i * slot_bytes_);
  in_slot_.resize(slot_count_);
  for (int i = l.ctas / l.cluster - 1; i >= 0; --i) queue_.push_back(i);
  if (schedule != Schedule::kForwards)
    for (size_t i = queue_.size(); i > 1; --i) std::swap(queue_[i - 1], queue_[random.below(uint32_t(i))]);
}

Machine::~Machine() {
  allow(slots_, slot_count_ * slot_bytes_);
  munmap(slots_, slot_count_ * slot_bytes_);
}

void Machine::start_clusters() {
  while (!queue_.empty() && int(free_slots_.size()) >= launch_.cluster) {
    const int first = queue_.back() * launch_.cluster;
    queue_.pop_back();
    Cluster* cluster = &clusters_.emplace_back();
    for (int rank = 0; rank < launch_.cluster; ++rank) start_cta(first + rank, rank, cluster);
    std::vector<Cta*> peers;
    for (int rank = 0; rank < launch_.cluster; ++rank) peers.push_back(ctas_[first + rank].get());
    for (Cta* cta : peers) cta->peers = peers;
    for (Cta* cta : peers) races::start(*cta);
  }
}

void Machine::start_cta(int index, int rank, Cluster* cluster) {
  ctas_[index] = std::make_unique<Cta>();
  Cta& cta = *ctas_[index];
  cta.index = index;
  cta.rank = rank;
  cta.cluster = cluster;
  char* slot = free_slots_.back();
  free_slots_.pop_back();
  in_slot_[size_t(slot - slots_) / slot_bytes_] = &cta;
  cta.shared = slot + kGuardZone;
  forbid(slot, kGuardZone);
  forbid(cta.shared + launch_.shared_bytes, slot_bytes_ - kGuardZone - launch_.shared_bytes);
  cta.live = launch_.threads;
  cluster->live += launch_.threads;
  const int warps = (launch_.threads + kLanes - 1) / kLanes;
  cta.warpgroups.resize((warps + 3) / 4);
  for (int i = 0; i < warps; ++i) {
    Warp& warp = cta.warps.emplace_back();
    warp.cta = &cta;
    warp.index = i;
    if (const int lanes = launch_.threads - i * kLanes; lanes < kLanes) warp.ended = kAllLanes << lanes;
  }
  for (int i = 0; i < launch_.threads; ++i) {
    cta.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *cta.threads.back();
    thread.cta = &cta;
    thread.warp = &cta.warps[i / kLanes];
    thread.index = i;
    thread.state = Thread::kWaiting;
    thread.fiber.start(entry, &thread);
    wake(thread);
  }
  ++running_;
  ++progress;
}

void Machine::entry(void* thread) {
  Thread& self = *static_cast<Thread*>(thread);
  try {
    machine->body_();
  } catch (...) {
    machine->error_ = std::current_exception();
  }
  self.state = Thread::kEnded;
  self.fiber.leave();
}

void Machine::run() {
  start_clusters();
  while (running_) {
    if (launch_.meanwhile && !random.below(64)) launch_.meanwhile();
    if (ready_.empty()) {
      idle();
      continue;
    }
    if (lateness == Lateness::kRandom && !random.below(8)) asynchronous_step();
    if (!paused_.empty() && !random.below(16)) {
      std::swap(paused_[random.below(uint32_t(paused_.size()))], paused_.back());
      wake(*paused_.back());
      paused_.pop_back();
    }
    Thread& thread = pick();
    thread.state = Thread::kRunning;
    current = &thread;
    thread.fiber.enter();
    if (error_) std::rethrow_exception(error_);
    if (thread.state == Thread::kEnded) end_thread(thread);
    current = nullptr;
  }
}

void Machine::end_thread(Thread& thread) {
  check_ended(thread);
  Warp& warp = *thread.warp;
  Cta& cta = *thread.cta;
  if (warp.arrived && !warp.at.kind->without_ended) fail("ends while other lanes of its warp are at " + warp.at.text());
  warp.ended |= 1u << thread.lane();
  --cta.live;
  --cta.cluster->live;
  ++progress;
  current = nullptr;
  if (warp.ended == kAllLanes) check_ended(warp);
  if (warp.arrived && (warp.arrived | warp.ended) == kAllLanes) {
    warp.met = std::exchange(warp.arrived, 0);
    warp.complete(warp);
  }
  sync_ended(cta);
  if (!cta.live) end_cta(cta);
}

void Machine::end_cta(Cta& cta) {
  const std::string name = "CTA " + std::to_string(cta.index);
  for (const BulkCopy& copy : bulk_copies)
    if (copy.to == &cta) fail(name + " ended while a bulk copy into its shared memory was under way");
  for (const Warpgroup& group : cta.warpgroups)
    if (!group.log.empty()) fail(name + " ended, and not all warps of a warpgroup did " + group.log.front().text());
  char* slot = cta.shared - kGuardZone;
  allow(slot, slot_bytes_);
  for (size_t i = 0; i < slot_bytes_; ++i) {
    const int64_t offset = int64_t(i) - kGuardZone;
    if (offset >= 0 && offset < launch_.shared_bytes) continue;
    if (static_cast<unsigned char>(slot[i]) != kPoison)
      fail(name + " stored out of bounds: at byte " + std::to_string(offset) + " of " +
           std::to_string(launch_.shared_bytes) + " bytes of shared memory");
  }
  std::memset(slot, kPoison, slot_bytes_);
  free_slots_.push_back(slot);
  cta.ended = true;
  favourite_ = last_ = nullptr;
  cta.threads.clear();
  cta.warps.clear();
  cta.cells = {};
  cta.seen = {};
  --running_;
  start_clusters();
}

void Machine::gather(Gathering& gathering, Warp& warp, int64_t all) {
  gathering.arrived += __builtin_popcount(warp.met);
  gathering.waiting.emplace_back(&warp, warp.met);
  if (gathering.arrived == all) open(gathering);
}

void Machine::open(Gathering& gathering) {
  races::meet(gathering.waiting);
  for (const auto& [warp, lanes] : gathering.waiting) wake(*warp, lanes);
  gathering = {};
}

bool Machine::find_shared(const void* p, Cta** cta, int64_t* offset) const {
  const size_t at = size_t(static_cast<const char*>(p) - slots_);
  if (at >= slot_count_ * slot_bytes_) return false;
  *cta = in_slot_[at / slot_bytes_];
  *offset = int64_t(at % slot_bytes_) - kGuardZone;
  return true;
}

uint32_t Machine::offset_of(const Cta& cta, const void* p, int64_t bytes, const char* what) const {
  const int64_t offset = static_cast<const char*>(p) - cta.shared;
  if (offset < 0 || offset + bytes > launch_.shared_bytes)
    fail(std::string(what) + " is at byte " + std::to_string(offset) + ", with " + std::to_string(bytes) +
         " bytes not inside the CTA's " + std::to_string(launch_.shared_bytes) + " of shared memory");
  return uint32_t(offset);
}

}  // namespace eqr::emu
