"""What ends a module: z <- (1 - lambda) z + lambda u + noise_scale eps, and the sum that the next module starts from;
also the start states, which are followed by the same sum.

The functions that a trajectory's code calls are not inlined, and find the program's part of each scratch tensor and
the trajectory's slot themselves: the registers do not suffice to keep that during the products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.channel_mixer import feature_scale
from eqr_kernels.ops.triton.philox import (
    normals_by_element,
    normals_by_four,
    truncated_normal,
    update_counter,
    word_of_element,
)


@triton.jit
def own(scratch: tl.tensor, size: tl.constexpr) -> tl.tensor:
    """Where this program's `size` elements of a scratch tensor [programs, ...] begin."""
    return scratch + tl.program_id(0).to(tl.int64) * size


@triton.jit
def slot_of(t: tl.tensor, quantum: tl.tensor) -> tl.tensor:
    """Of trajectory t, int64: its own in a launch of a quantum, else that of the program."""
    return tl.where(quantum > 0, t, tl.program_id(0).to(tl.int64))


@triton.jit
def in_slot(states: tl.tensor, t: tl.tensor, quantum: tl.tensor, size: tl.constexpr) -> tl.tensor:
    """Where the `size` elements of trajectory t of a tensor [slots, ...] begin."""
    return states + slot_of(t, quantum) * size


@triton.jit
def stream_of(ids: tl.tensor, t: tl.tensor, breadth: tl.tensor) -> tl.tensor:
    """Words of trajectory t's stream, uint32: id low, id high, restart. ids: int64 [N]."""
    ident = tl.load(ids + t // breadth)
    low = (ident & 0xFFFFFFFF).to(tl.uint32)
    high = ((ident >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return low, high, (t % breadth).to(tl.uint32)


@triton.jit
def injection(
    tokens: tl.tensor, embedding: tl.tensor, s: tl.tensor, f: tl.tensor, wanted: tl.tensor, p: tl.constexpr
) -> tl.tensor:
    """sqrt(d) embedding of the tokens at s [m], features f [n]; zero unless `wanted`, a scalar: float32 [m, n].

    tokens: int64 [S]. embedding: [V, width] in the compute dtype.
    """
    token = tl.load(tokens + s, mask=s < p.S, other=0)
    at = embedding + token[:, None] * p.width + f[None, :]
    return tl.load(at, mask=(s[:, None] < p.S) & wanted, other=0.0).to(tl.float32) * p.embedding_scale


@triton.jit
def noise(
    s: tl.tensor,
    f0: tl.tensor,
    c1: tl.tensor,
    id_low: tl.tensor,
    id_high: tl.tensor,
    seed: tl.tensor,
    restart: tl.tensor,
    p: tl.constexpr,
) -> tl.tensor:
    """Standard normals at tokens s [m], features f0 and on: float32 [m, row_features].

    c1: step << 8 | stream. All but s are scalars; the counters are uint32.
    """
    if p.d % 4 == 0:
        counter = s[:, None] * (p.d // 4) + (f0 // 4 + tl.arange(0, p.tile.row_features // 4))[None, :]
        return normals_by_four(counter.to(tl.uint32), c1, id_low, id_high, seed, restart)
    else:
        element = s[:, None] * p.d + (f0 + tl.arange(0, p.tile.row_features))[None, :]
        return normals_by_element(element.to(tl.uint32), c1, id_low, id_high, seed, restart)


@triton.jit(noinline=True)
def damped_update(
    a: tl.tensor,
    squares: tl.tensor,
    z: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    embedding: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    breadth: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
    m: tl.tensor,
    lambda_: tl.tensor,
    noise_scale: tl.tensor,
    norm_eps: tl.tensor,
    p: tl.constexpr,
) -> tl.tensor:
    """Update m of outer step `step` of trajectory t: z' = (1 - lambda) z + lambda RMSnorm(a) + noise_scale eps, and
    u = z_L + (z_H + e) as the next module takes it.

    a: float32 [programs, S, width], `squares` float32 [programs, squares_size] the sums of its rows' squares.
    z: float32 [slots, 4, S, width], two buffers of z_H and two of z_L, of which number step % 2 holds the state that
    the outer step began with and keeps it. u: [programs, S, width] in the compute dtype. quantum: see `slot_of`.
    tokens: int64 [N, S]. ids: int64 [N]. embedding: [V, width] in the compute dtype. seed: the 32 bits as an int32.

    Returns:
        The sums of (z' - z before the outer step)^2 and of z'^2, float32; zeros but where this closes the outer step.
    """
    M: tl.constexpr = p.tile.row_tokens
    N: tl.constexpr = p.tile.row_features
    size: tl.constexpr = p.S * p.width
    is_H = m % (p.L_cycles + 1) == p.L_cycles
    inject = m % (p.L_cycles + 1) != p.L_cycles - 1  # the next module is one of z_L
    first_H = m <= p.L_cycles  # z_H was not updated yet
    closes = m >= p.updates - 2
    parity = step % 2
    mine = in_slot(z, t, quantum, 4 * size)
    old_buffer = tl.where(is_H, 0, 2) + parity
    new_buffer = tl.where(is_H, 0, 2) + 1 - parity
    now_buffer = tl.where(tl.where(is_H, first_H, m == 0), old_buffer, new_buffer)
    old = mine + old_buffer * size
    new = mine + new_buffer * size
    now = mine + now_buffer * size
    other = mine + tl.where(is_H, 3 - parity, tl.where(first_H, parity, 1 - parity)) * size
    a = own(a, size)
    u = own(u, size)
    squares = own(squares, p.squares_size)
    tokens += t // breadth * p.S
    id_low, id_high, restart = stream_of(ids, t, breadth)
    key = seed.to(tl.uint32, bitcast=True)
    c1 = update_counter(step, m)

    change = tl.zeros((M, N), tl.float32)
    length = tl.zeros((M, N), tl.float32)
    for s0 in range(0, p.S, M):
        s = s0 + tl.arange(0, M)
        scale = feature_scale(squares, s, norm_eps, p)
        for f0 in range(0, p.width, N):
            f = f0 + tl.arange(0, N)
            at = s[:, None] * p.width + f[None, :]
            inside = s[:, None] < p.S
            value = (1.0 - lambda_) * tl.load(now + at, mask=inside, other=0.0)
            value += lambda_ * (tl.load(a + at, mask=inside, other=0.0) * scale[:, None])
            if noise_scale != 0.0:
                value += noise_scale * noise(s, f0, c1, id_low, id_high, key, restart, p)
            value = tl.where(inside & (f[None, :] < p.d), value, 0.0)
            tl.store(new + at, value, mask=inside)
            moved = value - tl.load(old + at, mask=inside & closes, other=0.0)
            change += moved * moved
            length += value * value
            second = tl.load(other + at, mask=inside, other=0.0)
            z_H = tl.where(is_H, value, second)
            z_L = tl.where(is_H, second, value)
            total = z_L + (z_H + injection(tokens, embedding, s, f, inject, p))
            tl.store(u + at, total.to(u.dtype.element_ty), mask=inside)
    moved_all = tl.where(closes, tl.sum(tl.sum(change, 1), 0), 0.0)
    length_all = tl.where(closes, tl.sum(tl.sum(length, 1), 0), 0.0)
    return moved_all, length_all


@triton.jit(noinline=True)
def start(
    z: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    embedding: tl.tensor,
    H_start: tl.tensor,
    L_start: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    breadth: tl.tensor,
    seed: tl.tensor,
    H_std: tl.tensor,
    L_std: tl.tensor,
    p: tl.constexpr,
) -> None:
    """The start states of trajectory t, in the buffers number 0, and u = z_L + (z_H + e).

    z, u, quantum, tokens, ids, embedding, seed: as in `damped_update`. H_start, L_start: float32 [width], read where
    the start is fixed.
    """
    M: tl.constexpr = p.tile.row_tokens
    N: tl.constexpr = p.tile.row_features
    size: tl.constexpr = p.S * p.width
    z = in_slot(z, t, quantum, 4 * size)
    u = own(u, size)
    tokens += t // breadth * p.S
    id_low, id_high, restart = stream_of(ids, t, breadth)
    key = seed.to(tl.uint32, bitcast=True)
    for s0 in range(0, p.S, M):
        s = s0 + tl.arange(0, M)
        for f0 in range(0, p.width, N):
            f = f0 + tl.arange(0, N)
            if p.fixed_start:
                zeros = tl.zeros((M, N), tl.float32)
                z_H = zeros + tl.load(H_start + f)[None, :]
                z_L = zeros + tl.load(L_start + f)[None, :]
            else:
                element = (s[:, None] * p.d + f[None, :]).to(tl.uint32)
                stream_H = tl.full((), 0, tl.uint32)
                stream_L = tl.full((), 1, tl.uint32)
                z_H = H_std * truncated_normal(word_of_element(element, stream_H, id_low, id_high, key, restart))
                z_L = L_std * truncated_normal(word_of_element(element, stream_L, id_low, id_high, key, restart))
            at = s[:, None] * p.width + f[None, :]
            inside = s[:, None] < p.S
            # The trajectory before may have left NaN in the padding.
            z_H = tl.where(f[None, :] < p.d, z_H, 0.0)
            z_L = tl.where(f[None, :] < p.d, z_L, 0.0)
            tl.store(z + at, z_H, mask=inside)
            tl.store(z + 2 * size + at, z_L, mask=inside)
            total = z_L + (z_H + injection(tokens, embedding, s, f, s0 >= 0, p))
            tl.store(u + at, total.to(u.dtype.element_ty), mask=inside)


@triton.jit(noinline=True)
def inject(
    z: tl.tensor,
    u: tl.tensor,
    tokens: tl.tensor,
    embedding: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    breadth: tl.tensor,
    step: tl.tensor,
    p: tl.constexpr,
) -> None:
    """u = z_L + (z_H + e) of trajectory t before outer step `step`, where another launch has left it.

    z, u, quantum, tokens, embedding: as in `damped_update`.
    """
    M: tl.constexpr = p.tile.row_tokens
    N: tl.constexpr = p.tile.row_features
    size: tl.constexpr = p.S * p.width
    z_H = in_slot(z, t, quantum, 4 * size) + step % 2 * size
    u = own(u, size)
    tokens += t // breadth * p.S
    for s0 in range(0, p.S, M):
        s = s0 + tl.arange(0, M)
        for f0 in range(0, p.width, N):
            f = f0 + tl.arange(0, N)
            at = s[:, None] * p.width + f[None, :]
            inside = s[:, None] < p.S
            e = injection(tokens, embedding, s, f, s0 >= 0, p)
            total = tl.load(z_H + 2 * size + at, mask=inside, other=0.0)
            total += tl.load(z_H + at, mask=inside, other=0.0) + e
            tl.store(u + at, total.to(u.dtype.element_ty), mask=inside)
