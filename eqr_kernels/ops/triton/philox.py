"""Philox4x32-10 words, standard normals and start states, as `eqr_kernels.noise` defines them (layout version 1)."""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_FIRST_UPDATE = tl.constexpr(2)  # stream of an outer step's first update; 0 and 1 are the starts of z_H and z_L


@triton.jit
def philox(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """Four words of each counter: c0 uint32 [...], the others uint32 [...] or scalars -> four uint32 [...]."""
    m0 = tl.full((), _M0, tl.uint32)
    m1 = tl.full((), _M1, tl.uint32)
    w0 = tl.full((), _W0, tl.uint32)
    w1 = tl.full((), _W1, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def update_counter(step: tl.tensor, m: tl.tensor) -> tl.tensor:
    """The second word of the counter, step << 8 | stream, in the m-th update of an outer step: int32 scalars."""
    return ((step << 8) + (m + _FIRST_UPDATE)).to(tl.uint32)


@triton.jit
def word_of_element(
    element: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """The word of each element: element uint32 [...], the rest scalars -> uint32 [...]."""
    w0, w1, w2, w3 = philox(element >> 2, c1, c2, c3, k0, k1)
    number = element & 3
    return tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    """uint32 [...] -> float32 [...] in (0, 1)."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def box_muller(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Two words uint32 [...] each -> two independent standard normals float32 [...] each."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(first)))
    turn = uniform(second)
    # Taking the quarter turns off first is exact, and spares the library's slow reduction of large angles.
    quarter = tl.floor(4.0 * turn + 0.5)
    x = (turn - 0.25 * quarter) * 6.283185307179586
    x2 = x * x
    sine = x + x * x2 * (-1.6666654611e-1 + x2 * (8.3321608736e-3 - x2 * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * x2
    cosine += x2 * x2 * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5))
    q = quarter.to(tl.int32)
    odd = (q & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((q + 1) & 2) == 2, -c, c)
    s = tl.where((q & 2) == 2, -s, s)
    return radius * c, radius * s


@triton.jit
def normals_by_element(
    element: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """Standard normals of any elements: element uint32 [...], the rest scalars -> float32 [...]."""
    w0, w1, w2, w3 = philox(element >> 2, c1, c2, c3, k0, k1)
    late = (element & 2) == 2
    even, odd = box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1))
    return tl.where((element & 1) == 1, odd, even)


@triton.jit
def normals_by_four(
    counter: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """Standard normals of whole counters: counter uint32 [m, n], the rest scalars -> float32 [m, 4 n], in order."""
    w0, w1, w2, w3 = philox(counter, c1, c2, c3, k0, k1)
    x0, x1 = box_muller(w0, w1)
    x2, x3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def truncated_normal(word: tl.tensor) -> tl.tensor:
    """The variance-compensated normal cut at +-2 (so at +-2.27) of each word: uint32 [...] -> float32 [...].

    sqrt(2) / 0.8796 erfinv(t) with t = erf(sqrt(2)) (2 u - 1); erfinv(t) / t is a polynomial in ln(1 - t^2), as in
    csrc/cpu/kernels/start.cpp.
    """
    v = 2.0 * uniform(word) - 1.0
    t = v * 0.954499722
    s = -tl.log((1.0 - t) * (1.0 + t)) * 0.826479435 - 1.0
    x = -1.40775899e-06 * s - 1.44176538e-05
    x = x * s + 8.40258945e-05
    x = x * s + 2.93433986e-04
    x = x * s - 4.03213315e-03
    x = x * s + 4.07561148e-03
    x = x * s + 0.301650077
    x = x * s + 1.17957282
    return 1.53459191 * v * x
