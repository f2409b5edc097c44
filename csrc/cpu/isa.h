// Which instruction set the CPU kernels run with, chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace eqr::cpu {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// The instruction sets that this build holds and this machine runs, best last.
std::vector<std::string> available_isas();

// Whether this build holds it and this machine runs it.
bool runs(Isa isa);

// The one in use: the best available, or what EQR_CPU_ISA or set_isa asked for.
// Throws std::invalid_argument when EQR_CPU_ISA names one that is not available.
Isa isa();
const char* isa_name(Isa isa);

// Throws std::invalid_argument when `name` is not available.
void set_isa(const std::string& name);

}  // namespace eqr::cpu

// A kernel is declared and defined once in each of the namespaces
// eqr::cpu::{portable,avx2,avx512,avx512_bf16,amx} (EQR_FOR_EACH_ISA inside eqr::cpu); EQR_DISPATCH calls the one in
// use, EQR_DISPATCH_TO that of a given one.
#ifdef EQR_X86
#define EQR_FOR_EACH_ISA(declarations) \
  namespace portable { \
  declarations \
  } \
  namespace avx2 { \
  declarations \
  } \
  namespace avx512 { \
  declarations \
  } \
  namespace avx512_bf16 { \
  declarations \
  } \
  namespace amx { \
  declarations \
  }
#define EQR_DISPATCH_TO(isa, kernel, ...) \
  ((isa) == ::eqr::cpu::Isa::amx           ? ::eqr::cpu::amx::kernel(__VA_ARGS__) \
   : (isa) == ::eqr::cpu::Isa::avx512_bf16 ? ::eqr::cpu::avx512_bf16::kernel(__VA_ARGS__) \
   : (isa) == ::eqr::cpu::Isa::avx512      ? ::eqr::cpu::avx512::kernel(__VA_ARGS__) \
   : (isa) == ::eqr::cpu::Isa::avx2        ? ::eqr::cpu::avx2::kernel(__VA_ARGS__) \
                                           : ::eqr::cpu::portable::kernel(__VA_ARGS__))
#else
#define EQR_FOR_EACH_ISA(declarations) \
  namespace portable { \
  declarations \
  }
#define EQR_DISPATCH_TO(isa, kernel, ...) ::eqr::cpu::portable::kernel(__VA_ARGS__)
#endif
#define EQR_DISPATCH(kernel, ...) EQR_DISPATCH_TO(::eqr::cpu::isa(), kernel, __VA_ARGS__)
