// Barriers of CTAs and clusters, and those in shared memory.
#include <cstring>

#include "machine.h"

namespace eqr::emu {
namespace {

constexpr Kind kSync{"sync", 0, true}, kSyncSome{"sync_some", 2, true}, kClusterSync{"cluster_sync", 0, true};
constexpr Kind kBarrierWait{"barrier_wait", 2};

constexpr int64_t kMostArrivals = (1 << 20) - 1;

// The 64 bits of a barrier in shared memory. Poison and zeros are no barrier.
struct Word {
  uint64_t mark : 2;
  uint64_t parity : 1;  // of the phase under way
  uint64_t count : 20;
  uint64_t pending : 20;
  int64_t bytes : 21;
};
static_assert(sizeof(Word) == 8);
constexpr uint64_t kMark = 1;

Word load(const Cta& cta, uint32_t offset, const char* who) {
  Word word;
  std::memcpy(&word, cta.shared + offset, sizeof(word));
  if (word.mark != kMark || !cta.mbarriers.count(offset))
    fail(std::string("does ") + who + " on a barrier that is not initialised, at byte " + std::to_string(offset) +
         " of CTA " + std::to_string(cta.index));
  return word;
}

void store(Cta& cta, uint32_t offset, Word word) {
  if (!word.pending && !word.bytes) {
    word.parity ^= 1;
    word.pending = word.count;
    races::complete(cta.mbarriers[offset]);
    for (Thread* thread : cta.mbarriers[offset].waiting) machine->wake(*thread);
    cta.mbarriers[offset].waiting.clear();
  }
  std::memcpy(cta.shared + offset, &word, sizeof(word));
  ++machine->progress;
}

void add_bytes(Word& word, int64_t bytes) {
  if (word.bytes + bytes > kMostArrivals || word.bytes + bytes < -kMostArrivals)
    fail("expects more bytes on a barrier than it can count");
  word.bytes += bytes;
}

void arrive(Cta& cta, uint32_t offset, int64_t bytes, const char* who) {
  Word word = load(cta, offset, who);
  if (!word.pending)
    fail(std::string("does ") + who + " on a barrier where all " + std::to_string(word.count) +
         " have arrived already, at byte " + std::to_string(offset) + " of CTA " + std::to_string(cta.index));
  add_bytes(word, bytes);
  --word.pending;
  races::access(*machine->current, cta, offset, 8, races::How::kLoad);
  races::arrive(*machine->current, cta.mbarriers[offset]);
  store(cta, offset, word);
}

uint32_t barrier_offset(const uint64_t* barrier) {
  const uint32_t offset = machine->offset_of(*machine->current->cta, barrier, 8, "a barrier");
  if (offset % 8) fail("names a barrier that is not at a multiple of 8 bytes");
  return offset;
}

Cta& peer(int rank) {
  const Cta& cta = *machine->current->cta;
  if (rank < 0 || rank >= int(cta.peers.size())) fail("names the CTA " + std::to_string(rank) + " of its cluster");
  return *cta.peers[rank];
}

}  // namespace

std::string mbarrier_text(const Cta& cta, uint32_t offset) {
  Word word;
  std::memcpy(&word, cta.shared + offset, sizeof(word));
  return "barrier at byte " + std::to_string(offset) + ": parity " + std::to_string(word.parity) + ", " +
         std::to_string(word.pending) + " of " + std::to_string(word.count) + " arrivals and " +
         std::to_string(word.bytes) + " bytes to come";
}

void bytes_came(Cta& cta, uint32_t offset, int bytes, uint32_t tick) {
  if (!cta.mbarriers.count(offset) || !cta.mbarriers[offset].published)
    fail("a bulk copy counts its bytes on a barrier that is not initialised, or not by barrier_init_done, at byte " +
         std::to_string(offset) + " of CTA " + std::to_string(cta.index));
  Word word = load(cta, offset, "bytes");
  add_bytes(word, -bytes);
  races::arrive(cta, tick, cta.mbarriers[offset]);
  store(cta, offset, word);
}

void sync_ended(Cta& cta) {
  if (Gathering& all = cta.gatherings[0]; all.arrived && all.arrived == cta.live) machine->open(all);
  if (Gathering& all = cta.cluster->gathering; all.arrived && all.arrived == cta.cluster->live) machine->open(all);
}

void Emulated::sync() {
  machine->meet({&kSync}, nullptr, [](Warp& warp) { machine->gather(warp.cta->gatherings[0], warp, warp.cta->live); });
}

void Emulated::sync_some(int id, int threads) {
  if (id < 1 || id > 15 || threads < kLanes || threads % kLanes || threads > int(machine->current->cta->threads.size()))
    fail("does sync_some(" + std::to_string(id) + ", " + std::to_string(threads) + "), and there is no such barrier");
  machine->meet({&kSyncSome, {id, threads}}, nullptr, [](Warp& warp) {
    Gathering& gathering = warp.cta->gatherings[warp.at.numbers[0]];
    const int64_t all = warp.at.numbers[1];
    if (gathering.arrived && gathering.threads != all)
      fail("does " + warp.at.text() + " where others wait for " + std::to_string(gathering.threads) + " threads");
    gathering.threads = all;
    if (gathering.arrived + __builtin_popcount(warp.met) > all)
      fail("does " + warp.at.text() + ", and more threads come than that");
    machine->gather(gathering, warp, all);
  });
}

void Emulated::cluster_sync() {
  machine->meet({&kClusterSync}, nullptr,
                [](Warp& warp) { machine->gather(warp.cta->cluster->gathering, warp, warp.cta->cluster->live); });
}

int Emulated::cluster_rank() { return machine->current->cta->rank; }
int Emulated::cluster_size() { return int(machine->current->cta->peers.size()); }

uint32_t Emulated::cluster_load(const uint32_t* p, int rank) {
  const uint32_t offset = machine->offset_of(*machine->current->cta, p, 4, "the word of a cluster_load");
  machine->maybe_switch();
  Cta& cta = peer(rank);
  if (cta.ended) fail("does cluster_load from CTA " + std::to_string(cta.index) + ", which has ended");
  races::access(*machine->current, cta, offset, 4, races::How::kLoad);
  uint32_t value;
  std::memcpy(&value, cta.shared + offset, sizeof(value));
  return value;
}

void Emulated::barrier_init(uint64_t* barrier, int count) {
  const uint32_t offset = barrier_offset(barrier);
  Cta& cta = *machine->current->cta;
  if (cta.mbarriers.count(offset)) fail("initialises a barrier twice, at byte " + std::to_string(offset));
  if (count < 1 || count > kMostArrivals) fail("initialises a barrier for " + std::to_string(count) + " arrivals");
  cta.mbarriers[offset].initialised_by = machine->current;
  races::access(*machine->current, cta, offset, 8, races::How::kStore);
  const Word word{kMark, 0, uint64_t(count), uint64_t(count), 0};
  std::memcpy(cta.shared + offset, &word, sizeof(word));
}

void Emulated::barrier_init_done() {
  for (auto& [offset, barrier] : machine->current->cta->mbarriers)
    barrier.published = barrier.published || barrier.initialised_by == machine->current;
}

void Emulated::barrier_arrive_expect(uint64_t* barrier, int bytes) {
  if (bytes < 0) fail("expects " + std::to_string(bytes) + " bytes on a barrier");
  machine->maybe_switch();
  arrive(*machine->current->cta, barrier_offset(barrier), bytes, "barrier_arrive_expect");
}

void Emulated::barrier_arrive(uint64_t* barrier, int rank) {
  const uint32_t offset = barrier_offset(barrier);
  machine->maybe_switch();
  Cta& cta = peer(rank);
  if (cta.ended) fail("does barrier_arrive on CTA " + std::to_string(cta.index) + ", which has ended");
  if (&cta != machine->current->cta && cta.mbarriers.count(offset) && !cta.mbarriers[offset].published)
    fail("does barrier_arrive on a barrier of another CTA that is not initialised by barrier_init_done");
  arrive(cta, offset, 0, "barrier_arrive");
}

void Emulated::barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t offset = barrier_offset(barrier);
  Cta& cta = *machine->current->cta;
  if (parity > 1) fail("waits on a barrier for parity " + std::to_string(parity));
  machine->maybe_switch();
  // Looked at anew after being woken: the next phase may be over by then too, and hangs a GPU all the same.
  while (load(cta, offset, "barrier_wait").parity == parity) {
    cta.mbarriers[offset].waiting.push_back(machine->current);
    machine->wait({&kBarrierWait, {int64_t(offset), parity}});
  }
  races::access(*machine->current, cta, offset, 8, races::How::kLoad);
  races::pass(*machine->current, cta.mbarriers[offset]);
}

}  // namespace eqr::emu
