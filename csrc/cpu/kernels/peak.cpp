// Built once per instruction set, with EQR_ISA naming the namespace. In assembly, since a compiler would move sums or
// operands to memory, or drop them. Every sum depends on nothing but itself; there are enough to hide the latency.
#include "cpu/peak.h"

#include "cpu/kernels/amx.h"

namespace eqr::cpu::EQR_ISA {

#if !defined(EQR_X86) || (defined(EQR_EMULATE_AVX512) && !defined(EQR_ISA_IS_portable) && !defined(EQR_ISA_IS_avx2))

int64_t peak_burst(Precision, int64_t) { return 0; }

#else

namespace {

// f(sum, scratch): where there is no fused instruction, a product waits in a scratch register. The last two registers
// hold the operands.
#define EQR_10(f) f(0, 10) f(1, 11) f(2, 12) f(3, 13) f(4, 10) f(5, 11) f(6, 12) f(7, 13) f(8, 10) f(9, 11)
#define EQR_24(f) \
  f(0, 24) f(1, 25) f(2, 26) f(3, 27) f(4, 28) f(5, 29) f(6, 24) f(7, 25) f(8, 26) f(9, 27) f(10, 28) f(11, 29) \
      f(12, 24) f(13, 25) f(14, 26) f(15, 27) f(16, 28) f(17, 29) f(18, 24) f(19, 25) f(20, 26) f(21, 27) f(22, 28) \
          f(23, 29)
#define EQR_LOW \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"

#if defined(EQR_ISA_IS_portable)
constexpr int kBytes = 16, kSums = 10;
#define EQR_SUMS EQR_10
#define EQR_CLOBBERED EQR_LOW
#define EQR_OPERANDS "movd %1, %%xmm15\n pshufd $0, %%xmm15, %%xmm15\n movdqa %%xmm15, %%xmm14\n"
#define EQR_CLEAR(n, t) "pxor %%xmm" #n ", %%xmm" #n "\n"
#define EQR_FLOAT(n, t) "movaps %%xmm14, %%xmm" #t "\n mulps %%xmm15, %%xmm" #t "\n addps %%xmm" #t ", %%xmm" #n "\n"
#define EQR_INT8(n, t) "movdqa %%xmm14, %%xmm" #t "\n pmaddwd %%xmm15, %%xmm" #t "\n paddd %%xmm" #t ", %%xmm" #n "\n"
#define EQR_END ""
#elif defined(EQR_ISA_IS_avx2)
constexpr int kBytes = 32, kSums = 10;
#define EQR_SUMS EQR_10
#define EQR_CLOBBERED EQR_LOW
#define EQR_OPERANDS "vmovd %1, %%xmm15\n vpbroadcastd %%xmm15, %%ymm15\n vmovdqa %%ymm15, %%ymm14\n"
#define EQR_CLEAR(n, t) "vpxor %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\n"
#define EQR_FLOAT(n, t) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define EQR_INT8(n, t) "vpmaddwd %%ymm14, %%ymm15, %%ymm" #t "\n vpaddd %%ymm" #t ", %%ymm" #n ", %%ymm" #n "\n"
#define EQR_END "vzeroupper\n"
#else
constexpr int kBytes = 64, kSums = 24;
#define EQR_SUMS EQR_24
#define EQR_CLOBBERED \
  EQR_LOW, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", \
      "xmm28", "xmm29", "xmm30", "xmm31"
#define EQR_OPERANDS "vpbroadcastd %1, %%zmm31\n vmovdqa64 %%zmm31, %%zmm30\n"
#define EQR_CLEAR(n, t) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define EQR_FLOAT(n, t) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#if defined(EQR_ISA_IS_avx512_bf16)
#define EQR_BF16(n, t) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define EQR_INT8(n, t) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"
#elif !defined(EQR_ISA_IS_amx)
#define EQR_INT8(n, t) "vpmaddwd %%zmm30, %%zmm31, %%zmm" #t "\n vpaddd %%zmm" #t ", %%zmm" #n ", %%zmm" #n "\n"
#endif
#define EQR_END "vzeroupper\n"
#endif

// `one` is the bit pattern of 32 bits of operand.
#define EQR_BURST(name, multiply_add) \
  __attribute__((noinline)) void name(int64_t rounds, int32_t one) { \
    asm volatile(EQR_OPERANDS EQR_SUMS(EQR_CLEAR) "1:\n" EQR_SUMS(multiply_add) "dec %0\n jnz 1b\n" EQR_END \
                 : "+r"(rounds) \
                 : "r"(one) \
                 : EQR_CLOBBERED, "cc"); \
  }
EQR_BURST(burst_float, EQR_FLOAT)
#if defined(EQR_INT8)
EQR_BURST(burst_int8, EQR_INT8)
#endif
#if defined(EQR_BF16)
EQR_BURST(burst_bf16, EQR_BF16)
#endif

constexpr int64_t operations(int64_t rounds, int operand_bytes) {
  return 2 * rounds * kSums * (kBytes / operand_bytes);
}

#if defined(EQR_ISA_IS_amx)
// Six registers of sums; the last two hold the operands.
#define EQR_TILES(f) f(0) f(1) f(2) f(3) f(4) f(5)
#define EQR_TILE_BF16(n) "tdpbf16ps %%tmm7, %%tmm6, %%tmm" #n "\n"
#define EQR_TILE_INT8(n) "tdpbusd %%tmm7, %%tmm6, %%tmm" #n "\n"
#define EQR_TILE_CLEAR(n) "tilezero %%tmm" #n "\n"

template <bool kInt8>
__attribute__((noinline)) int64_t burst_of_tiles(int64_t rounds) {
  alignas(64) int32_t ones[16 * 16];
  for (int32_t& word : ones) word = kInt8 ? 0x01010101 : 0x3F803F80;
  AmxShape shape;
  shape.set(kAmxRows);
  written();
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  int64_t left = rounds;
  if constexpr (kInt8)
    asm volatile(EQR_TILES(EQR_TILE_CLEAR) "1:\n" EQR_TILES(EQR_TILE_INT8) "dec %0\n jnz 1b\n" : "+r"(left)::"cc");
  else
    asm volatile(EQR_TILES(EQR_TILE_CLEAR) "1:\n" EQR_TILES(EQR_TILE_BF16) "dec %0\n jnz 1b\n" : "+r"(left)::"cc");
  return 2 * rounds * 6 * 16 * 16 * (kInt8 ? 64 : 32);
}
#endif

}  // namespace

int64_t peak_burst(Precision precision, int64_t rounds) {
  if (rounds <= 0) return 0;
#if defined(EQR_ISA_IS_amx)
  if (precision == Precision::int8) return burst_of_tiles<true>(rounds);
  if (precision == Precision::bf16) return burst_of_tiles<false>(rounds);
#endif
#if defined(EQR_INT8)
  if (precision == Precision::int8) {
#if defined(EQR_ISA_IS_avx512_bf16)
    burst_int8(rounds, 0x01010101);
    return operations(rounds, 1);
#else
    burst_int8(rounds, 0x00010001);  // bytes widened to 16 bits
    return operations(rounds, 2);
#endif
  }
#endif
#if defined(EQR_BF16)
  if (precision == Precision::bf16) {
    burst_bf16(rounds, 0x3F803F80);
    return operations(rounds, 2);
  }
#endif
  burst_float(rounds, 0x3F800000);
  return operations(rounds, 4);
}

#endif

}  // namespace eqr::cpu::EQR_ISA
