#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "cpu/fingerprint.h"

namespace {

std::vector<unsigned char> random_bytes(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<unsigned char> bytes(n);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

uint64_t of(const std::vector<unsigned char>& bytes, uint64_t seed = 0) {
  return eqr::cpu::fingerprint(bytes.data(), int64_t(bytes.size()), seed);
}

TEST(fingerprint_repeats_at_any_alignment) {
  const auto bytes = random_bytes(1000, 1);
  std::vector<unsigned char> shifted(1016);
  for (size_t shift = 0; shift < 16; ++shift) {
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + shift);
    CHECK(eqr::cpu::fingerprint(shifted.data() + shift, 1000, 5) == of(bytes, 5), shift);
  }
}

TEST(fingerprint_changes_with_any_byte) {
  for (size_t n : {1, 7, 8, 9, 63, 64, 65, 200, 1024, 1031}) {
    auto bytes = random_bytes(n, unsigned(n));
    std::set<uint64_t> seen{of(bytes)};
    for (size_t i = 0; i < n; ++i)
      for (int bit = 0; bit < 8; ++bit) {
        bytes[i] ^= 1 << bit;
        CHECK(seen.insert(of(bytes)).second, n, i, bit);
        bytes[i] ^= 1 << bit;
      }
  }
}

// One change must not undo another, in the same lane (64 bytes on) or in another.
TEST(fingerprint_tells_all_pairs_of_bits_apart) {
  auto bytes = random_bytes(80, 9);
  const auto flip = [&](int bit) { bytes[size_t(bit / 8)] ^= 1 << bit % 8; };
  std::vector<uint64_t> seen{of(bytes)};
  for (int i = 0; i < 640; ++i) {
    flip(i);
    seen.push_back(of(bytes));
    for (int j = i + 1; j < 640; ++j) {
      flip(j);
      seen.push_back(of(bytes));
      flip(j);
    }
    flip(i);
  }
  std::sort(seen.begin(), seen.end());
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
}

TEST(fingerprint_depends_on_position_length_and_seed) {
  const auto bytes = random_bytes(4096, 2);
  const uint64_t whole = of(bytes);
  for (size_t block : {1, 4, 8, 64, 512})
    for (size_t i = 0; i + 2 * block <= bytes.size(); i += block) {
      auto swapped = bytes;
      std::swap_ranges(swapped.begin() + i, swapped.begin() + i + block, swapped.end() - block);
      CHECK(swapped == bytes || of(swapped) != whole, block, i);
    }
  std::set<uint64_t> seen;
  for (size_t n = 0; n < 300; ++n) CHECK(seen.insert(of(std::vector<unsigned char>(n))).second, n);
  for (uint64_t seed = 0; seed < 300; ++seed) CHECK(seed == 0 || of(bytes, seed) != whole, seed);
}

// The usual edits of a weight: signs flipped, scaled by two, two rows exchanged.
TEST(fingerprint_notices_structured_edits) {
  std::mt19937 random(3);
  std::vector<float> weight(64 * 48);
  for (float& w : weight) w = float(random()) / 4e9f - 0.5f;
  const auto hash = [](const std::vector<float>& w) {
    return eqr::cpu::fingerprint(w.data(), int64_t(4 * w.size()), 0);
  };
  std::set<uint64_t> seen{hash(weight)};
  for (int stride : {1, 2, 3, 4, 8, 16, 48, 64})
    for (int first = 0; first < stride; ++first) {
      auto flipped = weight, doubled = weight;
      for (size_t i = size_t(first); i < weight.size(); i += size_t(stride)) {
        flipped[i] = -flipped[i];
        doubled[i] *= 2;
      }
      CHECK(seen.insert(hash(flipped)).second, stride, first);
      CHECK(seen.insert(hash(doubled)).second, stride, first);
    }
  for (int row = 1; row < 64; ++row) {
    auto swapped = weight;
    std::swap_ranges(swapped.begin(), swapped.begin() + 48, swapped.begin() + 48 * row);
    CHECK(seen.insert(hash(swapped)).second, row);
  }
}

}  // namespace
