"""Channel mixing: u <- u + SwiGLU(u) over features, in two products whose weights are streamed; also `add_product`,
which every block half ends in, and the RMS-norm over features that follows it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x sigmoid(x), float32 [...]."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gate_up(u: tl.tensor, weight: tl.tensor, h: tl.tensor, p: tl.constexpr) -> None:
    """h = silu(gate) * up.

    u: [S, width] in the compute dtype. weight: [2 hidden, width], gate rows first. h: [S, hidden].
    """
    M: tl.constexpr = p.tile.tokens
    N: tl.constexpr = p.tile.hidden
    for t0 in range(0, p.S, M):
        t = t0 + tl.arange(0, M)
        for n0 in range(0, p.hidden, N):
            n = n0 + tl.arange(0, N)
            gate = tl.zeros((M, N), tl.float32)
            up = tl.zeros((M, N), tl.float32)
            for k0 in range(0, p.width, p.inner):
                k = k0 + tl.arange(0, p.inner)
                x = tl.load(u + t[:, None] * p.width + k[None, :], mask=t[:, None] < p.S, other=0.0)
                at = weight + n[None, :] * p.width + k[:, None]
                gate = tl.dot(x, tl.load(at), gate, input_precision="ieee")
                up = tl.dot(x, tl.load(at + p.hidden * p.width), up, input_precision="ieee")
            value = silu(gate) * up
            tl.store(h + t[:, None] * p.hidden + n[None, :], value.to(h.dtype.element_ty), mask=t[:, None] < p.S)


@triton.jit
def add_product(
    x: tl.tensor,
    weight: tl.tensor,
    u: tl.tensor,
    a: tl.tensor,
    squares: tl.tensor,
    size: tl.constexpr,
    inner: tl.constexpr,
    p: tl.constexpr,
) -> None:
    """a = u + x weight^T, and for each token the sum of its squares.

    x: [S, size] in the compute dtype. weight: [width, size]. u: [S, width]. a: float32 [S, width]. squares: float32
    [S]. `inner`, the tile of the summed axis, divides `size`.
    """
    M: tl.constexpr = p.tile.tokens
    N: tl.constexpr = p.tile.columns
    for t0 in range(0, p.S, M):
        t = t0 + tl.arange(0, M)
        inside = t[:, None] < p.S
        total = tl.zeros((M,), tl.float32)
        for n0 in range(0, p.width, N):
            n = n0 + tl.arange(0, N)
            acc = tl.zeros((M, N), tl.float32)
            for k0 in range(0, size, inner):
                k = k0 + tl.arange(0, inner)
                rows = tl.load(x + t[:, None] * size + k[None, :], mask=inside, other=0.0)
                acc = tl.dot(rows, tl.load(weight + n[None, :] * size + k[:, None]), acc, input_precision="ieee")
            at = t[:, None] * p.width + n[None, :]
            acc += tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(acc * acc, 1)
            tl.store(a + at, acc, mask=inside)
        tl.store(squares + t, total, mask=t < p.S)


@triton.jit(noinline=True)
def normalise_features(a: tl.tensor, squares: tl.tensor, u: tl.tensor, norm_eps: tl.tensor, p: tl.constexpr) -> None:
    """u = RMSnorm over features of a. a: float32 [S, width]. squares: float32 [S]. u: [S, width]."""
    for t0 in range(0, p.S, p.tile.row_tokens):
        t = t0 + tl.arange(0, p.tile.row_tokens)
        scale = feature_scale(squares, t, norm_eps, p)
        for f0 in range(0, p.width, p.tile.row_features):
            f = f0 + tl.arange(0, p.tile.row_features)
            at = t[:, None] * p.width + f[None, :]
            inside = t[:, None] < p.S
            value = tl.load(a + at, mask=inside, other=0.0) * scale[:, None]
            value = tl.where(f[None, :] < p.d, value, 0.0)
            tl.store(u + at, value.to(u.dtype.element_ty), mask=inside)


@triton.jit
def feature_scale(squares: tl.tensor, t: tl.tensor, norm_eps: tl.tensor, p: tl.constexpr) -> tl.tensor:
    """1 / sqrt(mean square + eps) of tokens t [m]: squares float32 [S] -> float32 [m]."""
    return tl.rsqrt(tl.load(squares + t, mask=t < p.S, other=1.0) / p.d + norm_eps)
