"""Token mixing: u^T <- RMSnorm over tokens of (u^T + SwiGLU(u^T))."""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.channel_mixer import silu


@triton.jit
def mix_tokens(u: tl.tensor, weight_in: tl.tensor, weight_out: tl.tensor, norm_eps: tl.tensor, p: tl.constexpr) -> None:
    """A tile of features with all its tokens at a time, in place; nothing but u is read or written.

    u: [S, width] in the compute dtype. weight_in: [2 token_hidden, span], gate rows first. weight_out:
    [S, token_hidden].
    """
    M: tl.constexpr = p.tile.mix_features
    N: tl.constexpr = p.tile.mix_units
    K: tl.constexpr = p.tile_S
    s = tl.arange(0, K)
    for f0 in range(0, p.width, M):
        f = f0 + tl.arange(0, M)
        at = s[None, :] * p.width + f[:, None]
        x = tl.load(u + at, mask=s[None, :] < p.S, other=0.0)
        acc = tl.zeros((M, K), tl.float32)
        for n0 in range(0, p.token_hidden, N):
            n = n0 + tl.arange(0, N)
            rows = weight_in + n[None, :] * p.span + s[:, None]
            inside = s[:, None] < p.span
            gate = tl.dot(x, tl.load(rows, mask=inside, other=0.0), input_precision="ieee")
            rows += p.token_hidden * p.span
            up = tl.dot(x, tl.load(rows, mask=inside, other=0.0), input_precision="ieee")
            hidden = (silu(gate) * up).to(u.dtype.element_ty)
            out = tl.load(weight_out + s[None, :] * p.token_hidden + n[:, None], mask=s[None, :] < p.S, other=0.0)
            acc = tl.dot(hidden, out, acc, input_precision="ieee")
        acc += x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(acc * acc, 1) / p.S + norm_eps)
        value = tl.where(f[:, None] < p.d, acc * scale[:, None], 0.0)
        # Other threads may still be reading this tile of u.
        tl.debug_barrier()
        tl.store(u + at, value.to(u.dtype.element_ty), mask=s[None, :] < p.S)


@triton.jit
def token_gate_up(u: tl.tensor, weight: tl.tensor, h: tl.tensor, p: tl.constexpr) -> None:
    """h = silu(gate) * up over the token axis.

    u: [S, width] in the compute dtype. weight: [2 token_hidden, span], gate rows first. h: [token_hidden, width].
    """
    M: tl.constexpr = p.tile.tokens
    N: tl.constexpr = p.tile.columns
    for n0 in range(0, p.token_hidden, M):
        n = n0 + tl.arange(0, M)
        for f0 in range(0, p.width, N):
            f = f0 + tl.arange(0, N)
            gate = tl.zeros((M, N), tl.float32)
            up = tl.zeros((M, N), tl.float32)
            for s0 in range(0, p.span, p.inner_tokens):
                s = s0 + tl.arange(0, p.inner_tokens)
                x = tl.load(u + s[:, None] * p.width + f[None, :], mask=s[:, None] < p.S, other=0.0)
                at = weight + n[:, None] * p.span + s[None, :]
                gate = tl.dot(tl.load(at), x, gate, input_precision="ieee")
                up = tl.dot(tl.load(at + p.token_hidden * p.span), x, up, input_precision="ieee")
            value = silu(gate) * up
            tl.store(h + n[:, None] * p.width + f[None, :], value.to(h.dtype.element_ty))


@triton.jit
def token_down(
    h: tl.tensor, weight: tl.tensor, u: tl.tensor, a: tl.tensor, squares: tl.tensor, p: tl.constexpr
) -> None:
    """a = u + weight h, and for each feature the sum of its squares.

    h: [token_hidden, width] in the compute dtype. weight: [S, token_hidden]. u: [S, width]. a: float32 [S, width].
    squares: float32 [width].
    """
    M: tl.constexpr = p.tile.tokens
    N: tl.constexpr = p.tile.columns
    for f0 in range(0, p.width, N):
        f = f0 + tl.arange(0, N)
        total = tl.zeros((N,), tl.float32)
        for t0 in range(0, p.S, M):
            t = t0 + tl.arange(0, M)
            inside = t[:, None] < p.S
            acc = tl.zeros((M, N), tl.float32)
            for n0 in range(0, p.token_hidden, p.tile.inner):
                n = n0 + tl.arange(0, p.tile.inner)
                rows = tl.load(weight + t[:, None] * p.token_hidden + n[None, :], mask=inside, other=0.0)
                acc = tl.dot(rows, tl.load(h + n[:, None] * p.width + f[None, :]), acc, input_precision="ieee")
            at = t[:, None] * p.width + f[None, :]
            acc += tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(acc * acc, 0)
            tl.store(a + at, acc, mask=inside)
        tl.store(squares + f, total)


@triton.jit(noinline=True)
def normalise_tokens(a: tl.tensor, squares: tl.tensor, u: tl.tensor, norm_eps: tl.tensor, p: tl.constexpr) -> None:
    """u = RMSnorm over tokens of a. a: float32 [S, width]. squares: float32 [width]. u: [S, width]."""
    for t0 in range(0, p.S, p.tile.row_tokens):
        t = t0 + tl.arange(0, p.tile.row_tokens)
        for f0 in range(0, p.width, p.tile.row_features):
            f = f0 + tl.arange(0, p.tile.row_features)
            scale = tl.rsqrt(tl.load(squares + f) / p.S + norm_eps)
            at = t[:, None] * p.width + f[None, :]
            inside = t[:, None] < p.S
            value = tl.load(a + at, mask=inside, other=0.0) * scale[None, :]
            value = tl.where(f[None, :] < p.d, value, 0.0)
            tl.store(u + at, value.to(u.dtype.element_ty), mask=inside)
