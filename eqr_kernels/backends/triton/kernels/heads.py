"""The heads: logits, their change since the step before, the halting logit; and answers from logits."""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.damped_update import in_slot


@triton.jit(noinline=True)
def heads(
    z: tl.tensor,
    lm_head: tl.tensor,
    q_weight: tl.tensor,
    q_bias: tl.tensor,
    logits: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    step: tl.tensor,
    p: tl.constexpr,
) -> tl.tensor:
    """Logits after outer step `step`, from 0: in buffer number 1 - step % 2, compared with those of the step before.

    z: float32 [slots, 4, S, width], see `damped_update`. lm_head [V, width], q_weight [2, width], q_bias [2]: in the
    compute dtype. logits: float32 [slots, 2, S, V]. quantum: see `slot_of`, as for t.

    Returns:
        Mean over tokens of the norm of the logits' change, float32; how many are not finite, int32; q_halt, float32.
    """
    # Too few rows for the instructions that must not cross a call (wgmma); the products here are small.
    M: tl.constexpr = p.tile.row_tokens
    N: tl.constexpr = p.tile_V
    z_H = in_slot(z, t, quantum, 4 * p.S * p.width) + (1 - step % 2) * (p.S * p.width)
    mine = in_slot(logits, t, quantum, 2 * p.S * p.V)
    before = mine + step % 2 * (p.S * p.V)
    after = mine + (1 - step % 2) * (p.S * p.V)
    change = tl.zeros((M,), tl.float32)
    bad = tl.zeros((M,), tl.int32)
    for s0 in range(0, p.S, M):
        s = s0 + tl.arange(0, M)
        sums = tl.zeros((M,), tl.float32)
        for v0 in range(0, p.V, N):
            v = v0 + tl.arange(0, N)
            acc = tl.zeros((M, N), tl.float32)
            for k0 in range(0, p.width, p.inner):
                k = k0 + tl.arange(0, p.inner)
                x = tl.load(z_H + s[:, None] * p.width + k[None, :], mask=s[:, None] < p.S, other=0.0)
                w = tl.load(lm_head + v[None, :] * p.width + k[:, None], mask=v[None, :] < p.V, other=0.0)
                acc = tl.dot(x.to(w.dtype), w, acc, input_precision="ieee")
            at = s[:, None] * p.V + v[None, :]
            inside = (s[:, None] < p.S) & (v[None, :] < p.V)
            moved = tl.where(inside, acc - tl.load(before + at, mask=inside, other=0.0), 0.0)
            sums += tl.sum(moved * moved, 1)
            # False for NaN too.
            finite = tl.abs(acc) < float("inf")
            bad += tl.sum((inside & (finite == 0)).to(tl.int32), 1)
            tl.store(after + at, acc, mask=inside)
        change += tl.sqrt(sums)
    return tl.sum(change, 0) / p.S, tl.sum(bad, 0), halting_logit(z_H, q_weight, q_bias, p)


@triton.jit
def halting_logit(z_H: tl.tensor, q_weight: tl.tensor, q_bias: tl.tensor, p: tl.constexpr) -> tl.tensor:
    """q_halt, float32: the first row of q_weight [2, width] times the first token of z_H, float32 [S, width], plus the
    first of q_bias [2]."""
    N: tl.constexpr = p.tile.row_features
    acc = tl.zeros((N,), tl.float32)
    for f0 in range(0, p.width, N):
        f = f0 + tl.arange(0, N)
        acc += tl.load(z_H + f) * tl.load(q_weight + f).to(tl.float32)
    return tl.sum(acc, 0) + tl.load(q_bias).to(tl.float32)


@triton.jit
def answer(logits: tl.tensor, preds: tl.tensor, p: tl.constexpr) -> None:
    """preds = argmax over V of logits, the first of equals. logits: float32 [S, V], finite. preds: int64 [S]."""
    M: tl.constexpr = p.tile.row_tokens
    for s0 in range(0, p.S, M):
        s = s0 + tl.arange(0, M)
        best = tl.full((M,), float("-inf"), tl.float32)
        chosen = tl.zeros((M,), tl.int32)
        for v0 in range(0, p.V, p.tile_V):
            v = v0 + tl.arange(0, p.tile_V)
            at = s[:, None] * p.V + v[None, :]
            inside = (s[:, None] < p.S) & (v[None, :] < p.V)
            value = tl.load(logits + at, mask=inside, other=float("-inf"))
            most = tl.max(value, 1)
            first = tl.min(tl.where(value == most[:, None], v[None, :], p.V), 1)
            chosen = tl.where(most > best, first, chosen)
            best = tl.maximum(best, most)
        tl.store(preds + s, chosen.to(tl.int64), mask=s < p.S)
