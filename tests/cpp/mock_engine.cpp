#include "mock_engine.h"

#include <unistd.h>

#include <cmath>
#include <limits>
#include <random>
#include <thread>

namespace eqr::test {
namespace {

using cpu::Member;
using cpu::Packed;
using cpu::StepInput;
using cpu::StepOutput;

constexpr int64_t kState = 2 * kMockState, kChunk = 8, kTeam = 64;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

struct Workspace {
  StepOutput output;
  int64_t starts;
  int64_t marks[kTeam];  // what each member was called with
  float z[kState], next[kState];
  float change[kState / kChunk], size[kState / kChunk];
  float logits[kMockTokens * kMockVocabulary];
};

uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// In [-1, 1).
float uniform(uint64_t a, uint64_t b) { return float(mix(mix(a) + b) >> 40) * 0x1p-23f - 1.0f; }

uint64_t key(const StepInput& in) {
  uint64_t h = mix(uint64_t(in.rng[0])) + uint64_t(in.rng[1]);
  return mix(mix(h) + uint64_t(in.rng[2]));
}

void sleep_a_little(const Mock& mock) {
  thread_local std::minstd_rand random(unsigned(std::hash<std::thread::id>()(std::this_thread::get_id())));
  if (mock.fixed_sleep_us) usleep(unsigned(mock.fixed_sleep_us));
  if (mock.sleep_us && random() % 2) usleep(unsigned(random() % unsigned(mock.sleep_us)));
}

// All members must have been called alike.
void check_team(const Mock& mock, Workspace& w, const StepInput& in, const Member& member) {
  const int64_t mark = (in.rng[3] << 32 | in.rng[1] << 8 | member.size) + (in.rng[2] << 40);
  w.marks[member.rank] = mark;
  member.sync();
  for (int r = 0; r < member.size; ++r)
    if (w.marks[r] != mark) ++mock.mistakes;
  if (member.rank < 0 || member.rank >= member.size || reinterpret_cast<uintptr_t>(&w) % 64) ++mock.mistakes;
}

const Mock& unwrap(const Packed* packed) { return *reinterpret_cast<const Mock*>(packed); }

void start(const Packed* packed, void* workspace, const StepInput& in, const Member& member) {
  const Mock& mock = unwrap(packed);
  Workspace& w = *static_cast<Workspace*>(workspace);
  sleep_a_little(mock);
  check_team(mock, w, in, member);
  if (in.rng[3]) ++mock.mistakes;  // a given state comes by put_state
  if (member.rank == 0 && w.starts++ == 0) ++mock.workspaces;
  for (int64_t i = member.begin(kState); i < member.end(kState); ++i)
    w.z[i] = mock.zero ? 0 : uniform(key(in), uint64_t(i));
  member.sync();
}

// z_i of the next step reads what other members hold.
void move(const Mock& mock, Workspace& w, const StepInput& in, const Member& member) {
  const uint64_t k = key(in), answer = mix(k) % uint64_t(mock.answers);
  const float rate = 0.6f + 0.35f * uniform(k, 1 << 20);
  const auto target = [&](int64_t i) {
    if (mock.zero) return 0.0f;
    return uniform(mix(uint64_t(in.rng[2])) + answer, uint64_t(i)) + 0.1f * float(in.tokens[i % mock.tokens]);
  };
  for (int64_t i = member.begin(kState); i < member.end(kState); ++i) {
    const int64_t j = (i + 17) % kState;
    const float noise = in.noise_scale * uniform(k + uint64_t(in.rng[3] + 1), uint64_t(i));
    w.next[i] = target(i) + rate * (0.75f * (w.z[i] - target(i)) + 0.25f * (w.z[j] - target(j))) + noise;
  }
  member.sync();
}

void measure(const Mock& mock, Workspace& w, const Member& member) {
  constexpr int64_t chunks = kState / kChunk;
  for (int64_t c = member.begin(chunks); c < member.end(chunks); ++c) {
    float change = 0, size = 0;
    for (int64_t i = c * kChunk; i < (c + 1) * kChunk; ++i) {
      change += (w.next[i] - w.z[i]) * (w.next[i] - w.z[i]);
      size += w.next[i] * w.next[i];
    }
    w.change[c] = change;
    w.size[c] = size;
  }
  for (int64_t s = member.begin(mock.tokens); s < member.end(mock.tokens); ++s)
    for (int64_t v = 0; v < mock.vocabulary; ++v)
      w.logits[s * mock.vocabulary + v] = 3 * w.next[(s * 13 + v * 5) % kState] + w.next[(s + v * 31) % kState];
  member.sync();
}

void outer_step(const Packed* packed, void* workspace, const StepInput& in, const Member& member) {
  const Mock& mock = unwrap(packed);
  Workspace& w = *static_cast<Workspace*>(workspace);
  check_team(mock, w, in, member);
  move(mock, w, in, member);
  sleep_a_little(mock);
  measure(mock, w, member);
  for (int64_t i = member.begin(kState); i < member.end(kState); ++i) w.z[i] = w.next[i];
  if (member.rank == 0) {
    StepOutput out{w.logits, 0, 0, 0};
    for (float change : w.change) out.change_sq += change;
    for (float size : w.size) out.size_sq += size;
    out.q_halt = uniform(key(in), 7) + 0.3f - 2 * std::sqrt(out.change_sq / (out.size_sq + 1e-20f));
    const Fault fault = mock.fault ? mock.fault(in.rng[2], in.rng[1], in.rng[3]) : Fault::none;
    if (fault == Fault::nan_residual) out.change_sq = kNaN;
    if (fault == Fault::nan_logits) w.logits[mock.vocabulary + 1] = kNaN;
    if (fault == Fault::infinite_logits) w.logits[0] = -kInfinity;
    if (fault == Fault::nan_q) out.q_halt = kNaN;
    w.output = out;
    if (member.size > 1) {
      ++mock.shared_steps;
      int largest = mock.largest_team;
      while (largest < member.size && !mock.largest_team.compare_exchange_weak(largest, member.size)) continue;
    }
  }
  member.sync();
}

void put_state(const Packed* packed, void* workspace, const float* z_H, const float* z_L) {
  Workspace& w = *static_cast<Workspace*>(workspace);
  if (w.starts++ == 0) ++unwrap(packed).workspaces;
  for (int64_t i = 0; i < kMockState; ++i) w.z[2 * i] = z_H[i], w.z[2 * i + 1] = z_L[i];
}

void get_state(const Packed*, const void* workspace, float* z_H, float* z_L) {
  const Workspace& w = *static_cast<const Workspace*>(workspace);
  for (int64_t i = 0; i < kMockState; ++i) z_H[i] = w.z[2 * i], z_L[i] = w.z[2 * i + 1];
}

}  // namespace

cpu::Engine Mock::engine() const {
  return {.packed = reinterpret_cast<const Packed*>(this),
          .tokens = tokens,
          .vocabulary = vocabulary,
          .workspace_bytes = sizeof(Workspace),
          .start = start,
          .outer_step = outer_step,
          .put_state = put_state,
          .get_state = get_state};
}

}  // namespace eqr::test
