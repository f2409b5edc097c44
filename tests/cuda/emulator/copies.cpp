// Asynchronous copies: their destination is poison from the start, and filled at some later time.
#include <cstring>
#include <utility>

#include "machine.h"

namespace eqr::emu {
namespace {

void check_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail(std::string(what) + " at no multiple of 16 bytes");
}

}  // namespace

std::vector<char>& seen_by_async(Cta& cta) {
  if (cta.seen.empty()) cta.seen.assign(machine->shared_bytes(), char(kPoison));
  return cta.seen;
}

void copy_one(Thread& thread) {
  if (thread.copies.empty()) return;
  AsyncCopy& copy = thread.copies[machine->random.below(uint32_t(thread.copies.size()))];
  if (!std::exchange(copy.done, true)) std::memcpy(copy.to, copy.from, 16);
}

void check_ended(const Thread& thread) {
  if (!thread.copies.empty())
    fail("ends with " + std::to_string(thread.copies.size()) + " asynchronous copies that it has not waited for");
}

void copy_piece(size_t which) {
  BulkCopy& copy = machine->bulk_copies[which];
  const int units = copy.bytes / 16;
  const int bytes = 16 * (machine->lateness == Lateness::kRandom ? 1 + int(machine->random.below(units)) : units);
  const BulkCopy piece = copy;
  copy.offset += bytes;
  copy.from += bytes;
  copy.bytes -= bytes;
  if (!copy.bytes) {
    copy = machine->bulk_copies.back();
    machine->bulk_copies.pop_back();
  }
  std::memcpy(piece.to->shared + piece.offset, piece.from, bytes);
  std::memcpy(seen_by_async(*piece.to).data() + piece.offset, piece.from, bytes);
  bytes_came(*piece.to, piece.barrier, bytes, piece.tick);
}

void Emulated::copy_async(void* shared, const void* global) {
  Thread& self = *machine->current;
  const uint32_t offset = machine->offset_of(*self.cta, shared, 16, "the destination of copy_async");
  check_aligned(shared, "does copy_async to shared memory");
  check_aligned(global, "does copy_async from global memory");
  races::access(self, *self.cta, offset, 16, races::How::kStore);
  std::memset(shared, kPoison, 16);
  self.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), self.copy_group});
  if (machine->lateness == Lateness::kAtOnce) {
    std::memcpy(shared, global, 16);
    self.copies.back().done = true;
  }
}

void Emulated::copy_commit() { ++machine->current->copy_group; }

void Emulated::copy_wait(int groups) {
  Thread& self = *machine->current;
  std::erase_if(self.copies, [&](const AsyncCopy& copy) {
    const bool due = copy.group < self.copy_group - groups;
    if (!due) return false;
    races::access(self, *self.cta, uint32_t(copy.to - self.cta->shared), 16, races::How::kStore);
    if (!copy.done) std::memcpy(copy.to, copy.from, 16);
    return true;
  });
}

void Emulated::copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, uint32_t ranks) {
  machine->maybe_switch();
  const Cta& cta = *machine->current->cta;
  if (bytes < 16 || bytes % 16) fail("does copy_bulk of " + std::to_string(bytes) + " bytes");
  const uint32_t offset = machine->offset_of(cta, shared, bytes, "the destination of copy_bulk");
  const uint32_t counted = machine->offset_of(cta, barrier, 8, "the barrier of copy_bulk");
  check_aligned(shared, "does copy_bulk to shared memory");
  check_aligned(global, "does copy_bulk from global memory");
  if (!ranks || ranks >> cta.peers.size()) fail("does copy_bulk to the ranks " + std::to_string(ranks));
  for (Cta* to : cta.peers) {
    if (!(ranks >> to->rank & 1)) continue;
    if (to->ended) fail("does copy_bulk to CTA " + std::to_string(to->index) + ", which has ended");
    const uint32_t tick = races::bulk_store(*machine->current, *to, offset, bytes);
    std::memset(to->shared + offset, kPoison, bytes);
    std::memset(seen_by_async(*to).data() + offset, kPoison, bytes);
    machine->bulk_copies.push_back({to, offset, counted, static_cast<const char*>(global), bytes, tick});
    if (machine->lateness == Lateness::kAtOnce) copy_piece(machine->bulk_copies.size() - 1);
  }
}

void Emulated::async_fence() {
  Cta& cta = *machine->current->cta;
  races::fence(*machine->current);
  std::memcpy(seen_by_async(cta).data(), cta.shared, size_t(machine->shared_bytes()));
}

}  // namespace eqr::emu
