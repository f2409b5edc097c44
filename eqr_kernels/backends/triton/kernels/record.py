"""What is written down of a trajectory, at checkpoints and at its end."""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.damped_update import in_slot, slot_of
from eqr_kernels.backends.triton.kernels.heads import answer
from eqr_kernels.trajectory import Status

_RING = tl.constexpr(64)  # entries of the ring that are summed at a time
_DIVERGED = tl.constexpr(int(Status.DIVERGED))
_COPY = tl.constexpr(1024)


@triton.jit
def mean_of_ring(ring: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Mean of those of the first `count` entries that are not NaN, float32; NaN where there is none. ring: float32."""
    total = tl.zeros((_RING,), tl.float64)
    valid = tl.zeros((_RING,), tl.int32)
    first = 0
    while first < count:
        i = first + tl.arange(0, _RING)
        x = tl.load(ring + i, mask=i < count, other=float("nan"))
        total += tl.where(x == x, x, 0.0).to(tl.float64)
        valid += (x == x).to(tl.int32)
        first += _RING
    return (tl.sum(total, 0) / tl.sum(valid, 0).to(tl.float64)).to(tl.float32)


@triton.jit
def last_finite(
    logits: tl.tensor, t: tl.tensor, quantum: tl.tensor, done: tl.tensor, state: tl.tensor, p: tl.constexpr
) -> tl.tensor:
    """Where a trajectory's last finite logits begin, after `done` steps; a step that diverged does not count."""
    return in_slot(logits, t, quantum, 2 * p.S * p.V) + (done - (state == _DIVERGED).to(tl.int32)) % 2 * (p.S * p.V)


@triton.jit(noinline=True)
def write_rows(
    first: tl.tensor,
    until: tl.tensor,
    logits: tl.tensor,
    ring: tl.tensor,
    window: tl.tensor,
    preds: tl.tensor,
    q_halt: tl.tensor,
    residual: tl.tensor,
    score: tl.tensor,
    steps: tl.tensor,
    status: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    trajectories: tl.tensor,
    checkpoint_count: tl.tensor,
    done: tl.tensor,
    state: tl.tensor,
    p: tl.constexpr,
) -> None:
    """Rows first..until - 1 of trajectory t in the tables, all the same; q_halt and residual are those of the last row.

    logits: float32 [slots, 2, S, V]. ring: float32 [slots, window], the last changes of the logits. quantum: see
    `slot_of`. preds: int64 [C + 1, T, S]. q_halt, residual, score: float32 [C + 1, T]. steps, status: int64 [C + 1, T].
    """
    mine = last_finite(logits, t, quantum, done, state, p)
    # The residual of the first step stands in until there is a change.
    entries = tl.where(done > 1, tl.where(done - 1 < window, done - 1, window), done)
    mean = mean_of_ring(ring + slot_of(t, quantum) * window, entries)
    end = checkpoint_count.to(tl.int64) * trajectories + t
    last_q = tl.load(q_halt + end)
    last_residual = tl.load(residual + end)
    row = first
    while row < until:
        at = row.to(tl.int64) * trajectories + t
        answer(mine, preds + at * p.S, p)
        tl.store(q_halt + at, last_q, mask=row < checkpoint_count)
        tl.store(residual + at, last_residual, mask=row < checkpoint_count)
        tl.store(score + at, mean)
        tl.store(steps + at, done.to(tl.int64))
        tl.store(status + at, state.to(tl.int64))
        row += 1


@triton.jit(noinline=True)
def begin(
    logits: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    q_halt: tl.tensor,
    residual: tl.tensor,
    end: tl.tensor,
    p: tl.constexpr,
) -> None:
    """What is known of a trajectory that never ran: zeros in both of the slot's buffers of float32
    [slots, 2, S, V], NaN in q_halt and residual, float32, at its last row's place `end`."""
    tl.store(q_halt + end, float("nan"))
    tl.store(residual + end, float("nan"))
    mine = in_slot(logits, t, quantum, 2 * p.S * p.V)
    for i0 in range(0, 2 * p.S * p.V, _COPY):
        i = i0 + tl.arange(0, _COPY)
        tl.store(mine + i, 0.0, mask=i < 2 * p.S * p.V)


@triton.jit(noinline=True)
def copy_logits(
    logits: tl.tensor,
    quantum: tl.tensor,
    out: tl.tensor,
    t: tl.tensor,
    done: tl.tensor,
    state: tl.tensor,
    p: tl.constexpr,
) -> None:
    """The slot's last finite logits, of float32 [slots, 2, S, V], to row t of out, float32 [T, S, V]."""
    mine = last_finite(logits, t, quantum, done, state, p)
    for i0 in range(0, p.S * p.V, _COPY):
        i = i0 + tl.arange(0, _COPY)
        inside = i < p.S * p.V
        tl.store(out + t * (p.S * p.V) + i, tl.load(mine + i, mask=inside), mask=inside)
