// Functions that both devices have, always inlined: a file built for one instruction set must not lend its code to
// another, as the linker would have it where a function stands by itself.
#pragma once

#if defined(__CUDACC__)
#define EQR_INLINE __host__ __device__ __forceinline__
#else
#define EQR_INLINE static inline __attribute__((always_inline))
#endif
