// Tensor cores by warpgroups. Each warp computes its 16 rows at its own pace, at some time between the issue of an
// operation and the wait that covers it; until that wait the accumulators' registers hold poison.
#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "machine.h"

namespace eqr::emu {
namespace {

constexpr Kind kWgmma{"wgmma", 1}, kFence{"wgmma_fence", 0}, kCommit{"wgmma_commit", 0}, kWait{"wgmma_wait", 1};
constexpr Kind kFewer{"fewer_registers", 1}, kMore{"more_registers", 1};

constexpr uint32_t kPoisonWord = 0xFFFFFFFF;
constexpr int kRows = 16, kDepth = 16;  // of a warp's part of an operation

bool poisoned(float x) { return std::bit_cast<uint32_t>(x) == kPoisonWord; }

// A matrix in shared memory. Bits 0..13 of its descriptor are the start, 16..29 the "leading dimension byte offset" and
// 32..45 the "stride dimension byte offset", all in units of 16 bytes; 49..51 the base offset, 62..63 the swizzle mode.
class Operand {
 public:
  Operand(Cta& cta, uint64_t descriptor, int rows) : cta_(cta) {
    const auto field = [&](int bit) { return int64_t(descriptor >> bit & 0x3FFF) * 16; };
    if (descriptor >> 62) fail("gives wgmma a descriptor with a swizzle");
    if (descriptor & ~(0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32))
      fail("gives wgmma a descriptor with bits outside its start and offsets");
    start_ = field(0) - kWindow;
    // PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout", K-major without swizzle: core matrices of 8
    // rows x 16 bytes, contiguous; the leading dimension offset lies between those adjacent in K, the stride dimension
    // offset between those adjacent in M or N.
    along_k_ = field(16), along_rows_ = field(32);
    if (start_ < 0 || start_ + (rows / 8 - 1) * along_rows_ + along_k_ + 128 > machine->shared_bytes())
      fail("gives wgmma a descriptor that reaches from byte " + std::to_string(start_) + " to " +
           std::to_string(start_ + (rows / 8 - 1) * along_rows_ + along_k_ + 128) + " of " +
           std::to_string(machine->shared_bytes()) + " bytes of shared memory");
  }

  // to[k][row]
  template <int stride>
  void read(int first, int rows, float (*to)[stride]) const {
    const std::vector<char>& seen = seen_by_async(cta_);
    for (int row = 0; row < rows; ++row)
      for (int k8 = 0; k8 < kDepth / 8; ++k8) {
        const int64_t at = start_ + (first + row) / 8 * along_rows_ + k8 * along_k_ + (first + row) % 8 * 16;
        if (std::memcmp(cta_.shared + at, seen.data() + at, 16))
          throw Error("wgmma in CTA " + std::to_string(cta_.index) + " reads shared memory at byte " +
                      std::to_string(at) + " that was stored with no async_fence behind, or before its wgmma_wait");
        uint16_t halves[8];
        std::memcpy(halves, cta_.shared + at, 16);
        for (int i = 0; i < 8; ++i) to[8 * k8 + i][row] = from_bf16(halves[i]);
      }
  }

  void access(Thread& by, int first, int rows, bool note) const {
    for (int row = first; row < first + rows; row += 8)
      for (int k8 = 0; k8 < kDepth / 8; ++k8)
        races::access(by, cta_, uint32_t(start_ + row / 8 * along_rows_ + k8 * along_k_), 128, races::How::kLoadAsync,
                      nullptr, note);
  }

 private:
  Cta& cta_;
  int64_t start_, along_k_, along_rows_;
};

// The warps of a warpgroup must come to the same operations in the same order.
void record(Warp& warp, const Operation& operation) {
  Cta& cta = *warp.cta;
  if ((warp.index / 4 + 1) * 128 > int(cta.threads.size()))
    fail("does " + operation.text() + " in a warpgroup that is not whole");
  Warpgroup& group = cta.warpgroups[warp.index / 4];
  int64_t& at = group.at[warp.index % 4];
  const int64_t place = at++ - group.forgotten;
  if (place == int64_t(group.log.size()))
    group.log.push_back(operation);
  else if (group.log[place] != operation)
    fail("does " + operation.text() + " where another warp of its warpgroup does " + group.log[place].text() +
         (group.log[place].kind == operation.kind ? " with other operands" : ""));
  while (*std::min_element(group.at, group.at + 4) > group.forgotten) {
    group.log.pop_front();
    ++group.forgotten;
  }
}

InFlight& accumulators(Warp& warp, int count) {
  for (const auto& c : warp.in_flight) {
    if (c->registers[0] != warp.arguments[0]) continue;
    if (c->count != count || !std::equal(c->registers, c->registers + kLanes, warp.arguments))
      fail("gives wgmma accumulators that are in part those of another one under way");
    return *c;
  }
  if (!warp.fenced) fail("does wgmma with new accumulators, and no wgmma_fence since its last wgmma_wait");
  InFlight& c = *warp.in_flight.emplace_back(std::make_unique<InFlight>());
  c.count = count;
  c.values.resize(size_t(kLanes) * count);
  for (int lane = 0; lane < kLanes; ++lane) {
    c.registers[lane] = static_cast<float*>(warp.arguments[lane]);
    std::memcpy(&c.values[size_t(lane) * count], c.registers[lane], count * sizeof(float));
    std::memset(c.registers[lane], kPoison, count * sizeof(float));
  }
  return c;
}

void check_untouched(const InFlight& c) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (!std::all_of(c.registers[lane], c.registers[lane] + c.count, poisoned))
      fail("has stored to accumulators of a wgmma before the wgmma_wait that covers it (lane " + std::to_string(lane) +
           ")");
}

// At the issue and at the end: there must be no race with what is done between the two.
void access(const Warp& warp, const Wgmma& operation, bool note) {
  Thread& by = *warp.cta->threads[warp.index * kLanes];
  Operand(*warp.cta, operation.a, 64).access(by, warp.index % 4 * kRows, kRows, note);
  Operand(*warp.cta, operation.b, operation.n).access(by, 0, operation.n, note);
}

void issue(Warp& warp) {
  record(warp, warp.at);
  const int n = int(warp.at.numbers[0]);
  InFlight& c = accumulators(warp, n / 2);
  check_untouched(c);
  c.group = warp.wgmma_group;
  const Wgmma operation{uint64_t(warp.at.numbers[1]), uint64_t(warp.at.numbers[2]), n, &c, c.group};
  access(warp, operation, false);
  warp.wgmmas.push_back(operation);
  if (machine->lateness == Lateness::kAtOnce) wgmma_one(warp);
  machine->wake(warp, warp.met);
}

void finish(Warp& warp) {
  record(warp, warp.at);
  const int64_t last = warp.wgmma_group - warp.at.numbers[0];  // of the groups; this one may be under way
  while (!warp.wgmmas.empty() && warp.wgmmas.front().group < last) wgmma_one(warp);
  std::erase_if(warp.done_wgmmas, [&](const Wgmma& operation) {
    if (operation.group < last && races::kOn) access(warp, operation, true);
    return operation.group < last;
  });
  std::erase_if(warp.in_flight, [&](const auto& c) {
    if (c->group >= last) return false;
    check_untouched(*c);
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(c->registers[lane], &c->values[size_t(lane) * c->count], c->count * sizeof(float));
    return true;
  });
  warp.fenced = false;
  races::meet({{&warp, warp.met}});  // lane 0 stands for all in what wgmma reads
  machine->wake(warp, warp.met);
}

}  // namespace

void wgmma_one(Warp& warp) {
  if (warp.wgmmas.empty()) return;
  const Wgmma operation = warp.wgmmas.front();
  warp.wgmmas.pop_front();
  InFlight& c = *operation.c;
  const int n = operation.n, first = warp.index % 4 * kRows;
  warp.done_wgmmas.push_back(operation);
  static float a[kDepth][kRows], b[kDepth][256];
  Operand(*warp.cta, operation.a, 64).read(first, kRows, a);
  Operand(*warp.cta, operation.b, n).read(0, n, b);
  for (int row = 0; row < kRows; ++row) {
    float sum[256] = {};
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < n; ++j) sum[j] += a[k][row] * b[k][j];
    // PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix D: thread l of warp w holds in d[i] the row
    // 16 w + l / 4 + 8 (i / 2 % 2) and the column 8 (i / 4) + 2 (l % 4) + i % 2.
    for (int j = 0; j < n; ++j) {
      const int lane = row % 8 * 4 + j % 8 / 2, i = j / 8 * 4 + row / 8 * 2 + j % 2;
      c.values[size_t(lane) * c.count + i] += sum[j];
    }
  }
}

void check_ended(const Warp& warp) {
  if (!warp.in_flight.empty())
    fail("warp " + std::to_string(warp.index) + " of CTA " + std::to_string(warp.cta->index) +
         " ends with a wgmma that it has not waited for");
}

void Emulated::wgmma_fence() {
  machine->meet({&kFence}, nullptr, [](Warp& warp) {
    record(warp, warp.at);
    warp.fenced = true;
    machine->wake(warp, warp.met);
  });
}

void Emulated::wgmma_commit() {
  machine->meet({&kCommit}, nullptr, [](Warp& warp) {
    record(warp, warp.at);
    ++warp.wgmma_group;
    machine->wake(warp, warp.met);
  });
}

void Emulated::wgmma_wait(int groups) { machine->meet({&kWait, {groups}}, nullptr, finish); }

void Emulated::wgmma(float* c, int n, uint64_t a, uint64_t b) {
  machine->meet({&kWgmma, {n, int64_t(a), int64_t(b)}}, c, issue);
}

void Emulated::hold(const float* c) {
  const Thread& self = *machine->current;
  for (const auto& other : self.warp->in_flight)
    if (other->registers[self.lane()] == c) fail("does hold with accumulators of a wgmma before the wgmma_wait");
}

void Emulated::set_registers(int n, bool more) {
  machine->meet({more ? &kMore : &kFewer, {n}}, nullptr, [](Warp& warp) {
    record(warp, warp.at);
    machine->wake(warp, warp.met);
  });
}

}  // namespace eqr::emu
