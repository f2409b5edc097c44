// The thread's place, global memory and arithmetic.
#include <cmath>

#include "bf16.h"
#include "machine.h"

namespace eqr::emu {

int Emulated::thread() { return machine->current->index; }
int Emulated::cta() { return machine->current->cta->index; }
int Emulated::ctas() { return machine->ctas(); }
char* Emulated::shared() { return machine->current->cta->shared; }
uint32_t Emulated::shared_address(const void* p) {
  return kWindow + machine->offset_of(*machine->current->cta, p, 0, "an address of shared memory");
}

void Emulated::keep_order() {}
uint64_t Emulated::opaque(uint64_t value) { return value; }

uint64_t Emulated::atomic_add(uint64_t* p, uint64_t value) {
  machine->maybe_switch();
  const uint64_t before = *p;
  *p += value;
  machine->progress += value != 0;
  return before;
}

uint64_t Emulated::atomic_min(uint64_t* p, uint64_t value) {
  machine->maybe_switch();
  const uint64_t before = *p;
  if (value < before) {
    *p = value;
    ++machine->progress;
  }
  return before;
}

uint64_t Emulated::load_relaxed(const uint64_t* p) {
  machine->look();
  return *p;
}

void Emulated::add_release(uint32_t* p, uint32_t value) {
  machine->maybe_switch();
  *p += value;
  machine->progress += value != 0;
}

uint32_t Emulated::load_acquire(const uint32_t* p) {
  machine->look();
  return *p;
}

void Emulated::pause() { machine->pause(); }

int64_t Emulated::load_system(const int64_t* p) {
  machine->look();
  return *p;
}

void Emulated::store_system(int64_t* p, int64_t value) {
  machine->maybe_switch();
  machine->progress += *p != value;
  *p = value;
}

uint32_t Emulated::pack_bf16(float low, float high) { return uint32_t(to_bf16(low)) | uint32_t(to_bf16(high)) << 16; }

float Emulated::rsqrt(float x) { return float(1 / std::sqrt(double(x))); }
float Emulated::log(float x) { return std::log(x); }
float Emulated::sqrt(float x) { return std::sqrt(x); }
float Emulated::rough_exp(float x) { return std::exp(x); }
float Emulated::rough_divide(float x, float y) { return x / y; }

float Emulated::erfinv(float x) {
  const double y = x;
  if (!(std::fabs(y) < 1)) return y == 1 || y == -1 ? float(y * INFINITY) : NAN;
  if (y == 0) return x;
  // Winitzki's approximation, to 2e-3, then Newton's method.
  const double a = 0.147, l = std::log((1 - y) * (1 + y)), m = 2 / (M_PI * a) + l / 2;
  double z = std::copysign(std::sqrt(std::sqrt(m * m - l / a) - m), y);
  for (int i = 0; i < 4; ++i) {
    const double error = y > 0.5 ? (1 - y) - std::erfc(z) : y < -0.5 ? std::erfc(-z) - (1 + y) : std::erf(z) - y;
    const double step = error / (2 / std::sqrt(M_PI) * std::exp(-z * z));
    z -= step / (1 + z * step);
  }
  return float(z);
}

void Emulated::sincos_pi(float x, float* sine, float* cosine) {
  const double quarter = std::rint(2 * double(x)), rest = M_PI * (double(x) - quarter / 2);
  const double s = std::sin(rest), c = std::cos(rest);
  switch (int(std::fmod(quarter, 4)) & 3) {
    case 0: *sine = float(s), *cosine = float(c); break;
    case 1: *sine = float(c), *cosine = float(-s); break;
    case 2: *sine = float(-s), *cosine = float(-c); break;
    default: *sine = float(-c), *cosine = float(s);
  }
}

}  // namespace eqr::emu
