#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(EQR_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eqr::cpu {
namespace {

constexpr int undecided = -1;
std::atomic<int> chosen{undecided};

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

std::vector<Isa> available() {
  std::vector<Isa> found;
  for (Isa isa : kAll)
    if (runs(isa)) found.push_back(isa);
  return found;
}

Isa parse(const std::string& name, const std::string& source) {
  for (Isa isa : kAll)  // of all, since asking for those available asks for AMX, which lasts as long as the process
    if (name == isa_name(isa) && runs(isa)) return isa;
  std::string known;
  for (Isa isa : available()) known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  throw std::invalid_argument(source + " is '" + name + "', which this build or this machine does not have; choose " +
                              "from " + known + ", or leave it unset for the best");
}

#if defined(EQR_X86) && !defined(EQR_EMULATE_AVX512) && !defined(EQR_EMULATE_AMX)
// Whether the CPU has AMX for bf16 and int8, and the system lets this process use it. Linux keeps room for the tile
// registers only in processes that have asked for it (its documentation, x86/xstate), and all of their threads.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

bool runs(Isa isa) {
#ifdef EQR_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef EQR_EMULATE_AVX512
  const bool avx512 = avx2, bf16 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512_bf16) return bf16;
#if defined(EQR_EMULATE_AVX512) || defined(EQR_EMULATE_AMX)
  if (isa == Isa::amx) return avx2;
#else
  if (isa == Isa::amx) {
    static const bool allowed = bf16 && may_use_amx();
    return allowed;
  }
#endif
#endif
  return isa == Isa::portable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : available()) names.emplace_back(isa_name(isa));
  return names;
}

Isa isa() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value == undecided) {
    const char* wanted = std::getenv("EQR_CPU_ISA");
    value = int(wanted && *wanted ? parse(wanted, "the environment variable EQR_CPU_ISA") : available().back());
    chosen.store(value, std::memory_order_relaxed);
  }
  return Isa(value);
}

void set_isa(const std::string& name) { chosen.store(int(parse(name, "isa")), std::memory_order_relaxed); }

}  // namespace eqr::cpu
