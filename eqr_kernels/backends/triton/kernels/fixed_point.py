"""The persistent kernel: every program takes trajectories from a queue and iterates each to its end.

In a launch of a quantum it iterates each for so many outer steps, and its slot holds what the next launch goes on with.

N puzzles x B restarts = T trajectories; trajectory t is restart t % B of puzzle t // B. The rules are those of
csrc/cpu/loop/trajectory.cpp and csrc/cpu/loop/fixed_point.cpp. No program ever waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.damped_update import inject, slot_of, start
from eqr_kernels.backends.triton.kernels.heads import heads
from eqr_kernels.backends.triton.kernels.outer_step import outer_step
from eqr_kernels.backends.triton.kernels.record import begin, copy_logits, write_rows
from eqr_kernels.run_rules import Halt
from eqr_kernels.trajectory import Status

_GOING = tl.constexpr(-1)
_CONVERGED = tl.constexpr(int(Status.CONVERGED))
_HALTED = tl.constexpr(int(Status.HALTED))
_MAX_DEPTH = tl.constexpr(int(Status.MAX_DEPTH))
_CANCELLED = tl.constexpr(int(Status.CANCELLED))
_DIVERGED = tl.constexpr(int(Status.DIVERGED))

# Halting rules.
_RESIDUAL = tl.constexpr(int(Halt.residual))
_Q = tl.constexpr(int(Halt.q))
_RESIDUAL_AND_Q = tl.constexpr(int(Halt.residual_and_q))
_RESIDUAL_OR_Q = tl.constexpr(int(Halt.residual_or_q))

# Of `counters`.
_QUEUE = tl.constexpr(0)
_STOP = tl.constexpr(1)
_FINISHED = tl.constexpr(2)
_SPENT = tl.constexpr(3)


@triton.jit
def stopped(counters: tl.tensor, control: tl.tensor) -> tl.tensor:
    """Whether the caller wants no more, the same for all threads of the program.

    counters: int64 [4]. control: int64 [3].
    """
    # The host may write between two threads' loads; an atomic has one thread act for all.
    tl.atomic_max(counters + _STOP, (tl.load(control, volatile=True) != 0).to(tl.int64))
    return tl.atomic_add(counters + _STOP, 0) != 0


@triton.jit
def cannot_win(best: tl.tensor, t: tl.tensor, breadth: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """Settling at the step after `steps` would be too late for trajectory t.

    best: int64 [N], steps << 32 | restart of each puzzle's first to settle so far, only ever lowered.
    """
    mine = ((steps + 1).to(tl.int64) << 32) | (t % breadth)
    return mine > tl.atomic_add(best + t // breadth, 0)


@triton.jit(
    do_not_specialize=[
        "trajectories",
        "count",
        "quantum",
        "breadth",
        "depth",
        "seed",
        "halt",
        "patience",
        "window",
        "race",
        "checkpoint_count",
        "trace",
        "layers",
    ],
    # The caller's tensors may lie anywhere, and no compilation should depend on where.
    do_not_specialize_on_alignment=["tokens", "ids", "checkpoints", "control"],
)
def fixed_point(
    tokens: tl.tensor,  # int64 [N, S]
    ids: tl.tensor,  # int64 [N]
    embedding: tl.tensor,  # [V, width], this and the weights below in the compute dtype
    lm_head: tl.tensor,  # [V, width]
    q_weight: tl.tensor,  # [2, width]
    q_bias: tl.tensor,  # [2]
    mixer_in: tl.tensor,  # [layers, 2 token_hidden, span]; attention: [layers, 3 d, width]
    mixer_out: tl.tensor,  # [layers, S, token_hidden]; attention: [layers, width, width]
    gate_up: tl.tensor,  # [layers, 2 hidden, width]
    down: tl.tensor,  # [layers, width, hidden]
    cos: tl.tensor,  # float32 [S, head_dim], read only with rotation
    sin: tl.tensor,  # float32 [S, head_dim]
    H_start: tl.tensor,  # float32 [width], read only where the start is fixed
    L_start: tl.tensor,  # float32 [width]
    # Scratch space, of which every program has its own.
    a: tl.tensor,  # float32 [programs, S, width]
    squares: tl.tensor,  # float32 [programs, squares_size]
    h: tl.tensor,  # [programs, work] in the compute dtype, and so is u
    u: tl.tensor,  # [programs, S, width]
    # A trajectory's own: a slot for each program, or with a quantum for each trajectory.
    z: tl.tensor,  # float32 [slots, 4, S, width]
    logits: tl.tensor,  # float32 [slots, 2, S, V]
    ring: tl.tensor,  # float32 [slots, window]
    # In memory, for the registers do not suffice to keep them during the products.
    parked: tl.tensor,  # int64 [T, 3]: outer steps before this launch, streak, next checkpoint; zeros to begin with
    rows: tl.tensor,  # int64 [count], with a quantum: which trajectories
    # Results. Row i of C + 1 is checkpoint i, the last row the end.
    preds: tl.tensor,  # int64 [C + 1, T, S]
    q_halt: tl.tensor,  # float32 [C + 1, T]
    residual: tl.tensor,  # float32 [C + 1, T]
    score: tl.tensor,  # float32 [C + 1, T]
    steps: tl.tensor,  # int64 [C + 1, T]
    status: tl.tensor,  # int64 [C + 1, T]
    final: tl.tensor,  # float32 [T, S, V], logits
    residuals: tl.tensor,  # float32 [T, depth], written only with `trace`
    checkpoints: tl.tensor,  # int64 [C], rising
    counters: tl.tensor,  # int64 [4], zeros at each launch
    best: tl.tensor,  # int64 [N], the largest, for a race
    control: tl.tensor,  # int64 [3] of the host: [0] not 0 cancels; [1] finished and [2] spent are written
    trajectories: tl.tensor,
    count: tl.tensor,  # trajectories of this launch
    quantum: tl.tensor,  # outer steps of each in this launch; 0: each to its end
    breadth: tl.tensor,
    depth: tl.tensor,
    seed: tl.tensor,  # the 32 bits as an int32
    halt: tl.tensor,  # of Halt
    patience: tl.tensor,
    window: tl.tensor,
    race: tl.tensor,  # 1: cancel siblings that cannot be first
    checkpoint_count: tl.tensor,
    trace: tl.tensor,
    layers: tl.tensor,  # not a constant, lest the compiler unrolls them
    tol: tl.tensor,
    noise_scale: tl.tensor,
    lambda_: tl.tensor,
    norm_eps: tl.tensor,
    H_std: tl.tensor,
    L_std: tl.tensor,
    p: tl.constexpr,  # Plan
) -> None:
    place = tl.atomic_add(counters + _QUEUE, 1)
    while place < count:
        t = tl.load(rows + place, mask=quantum > 0, other=0)
        t = tl.where(quantum > 0, t, place)
        done = tl.load(parked + t * 3).to(tl.int32)  # outer steps
        state = _GOING
        if done > 0:
            inject(z, u, tokens, embedding, t, quantum, breadth, done, p)
            tl.debug_barrier()
        else:
            begin(logits, t, quantum, q_halt, residual, checkpoint_count.to(tl.int64) * trajectories + t, p)
            tl.debug_barrier()
        if race != 0:
            if cannot_win(best, t, breadth, done):
                state = _CANCELLED
        over = 0
        while over == 0:
            if state == _GOING:
                if stopped(counters, control):
                    state = _CANCELLED
                    tl.store(residual + (checkpoint_count.to(tl.int64) * trajectories + t), float("nan"))
                    tl.debug_barrier()
            if state == _GOING:
                if done == 0:
                    start(z, u, tokens, ids, embedding, H_start, L_start, t, quantum, breadth, seed, H_std, L_std, p)
                    tl.debug_barrier()
                moved, length = outer_step(
                    z,
                    u,
                    h,
                    a,
                    squares,
                    tokens,
                    ids,
                    embedding,
                    mixer_in,
                    mixer_out,
                    gate_up,
                    down,
                    cos,
                    sin,
                    t,
                    quantum,
                    breadth,
                    seed,
                    done,
                    layers,
                    lambda_,
                    noise_scale,
                    norm_eps,
                    p,
                )
                change, bad, last_q = heads(z, lm_head, q_weight, q_bias, logits, t, quantum, done, p)
                # A state that is zero and stays so has settled: 0 / 0 counts as 0.
                still = (moved == 0.0) & (length == 0.0)
                last_residual = tl.where(still, 0.0, tl.sqrt(moved / length))
                finite = (bad == 0) & (tl.abs(last_residual) < float("inf")) & (tl.abs(last_q) < float("inf"))
                end = checkpoint_count.to(tl.int64) * trajectories + t
                tl.store(residual + end, last_residual)
                tl.store(q_halt + end, last_q)
                # At depth 1 there is no difference yet: the residual stands in, and the first difference replaces it.
                newest = tl.where(done == 0, 0, (done - 1) % window)
                tl.store(ring + slot_of(t, quantum) * window + newest, tl.where(done == 0, last_residual, change))
                if trace != 0:
                    tl.store(residuals + t * depth + done, last_residual)
                done += 1
                tl.store(control + 2, tl.atomic_add(counters + _SPENT, 1) + 1)
                streak = tl.load(parked + t * 3 + 1).to(tl.int32)
                streak = tl.where(last_residual <= tol, streak + 1, 0)
                state = tl.where(done == depth, _MAX_DEPTH, state)
                low = streak >= patience
                positive = last_q > 0.0
                state = tl.where(((halt == _Q) | (halt == _RESIDUAL_OR_Q)) & positive, _HALTED, state)
                state = tl.where(((halt == _RESIDUAL) | (halt == _RESIDUAL_OR_Q)) & low, _CONVERGED, state)
                state = tl.where((halt == _RESIDUAL_AND_Q) & low & positive, _CONVERGED, state)
                state = tl.where(finite, state, _DIVERGED)
                if race != 0:
                    if (state == _CONVERGED) | (state == _HALTED):
                        tl.atomic_min(best + t // breadth, (tl.cast(done, tl.int64) << 32) | (t % breadth))
                    if state == _GOING:
                        if cannot_win(best, t, breadth, done):
                            state = _CANCELLED
                tl.debug_barrier()
                tl.store(parked + t * 3 + 1, streak.to(tl.int64))
            ended = state != _GOING
            begun = tl.load(parked + t * 3)
            over = tl.where(ended | ((quantum > 0) & (done == begun + quantum)), 1, 0)
            # Written now: the checkpoint that was just reached; at the end it, all later ones, and the end.
            mark = tl.load(parked + t * 3 + 2).to(tl.int32)
            at = tl.load(checkpoints + mark, mask=mark < checkpoint_count, other=-1)
            until = tl.where(ended, checkpoint_count + 1, tl.where(at == done, mark + 1, mark))
            if mark < until:
                write_rows(
                    mark,
                    until,
                    logits,
                    ring,
                    window,
                    preds,
                    q_halt,
                    residual,
                    score,
                    steps,
                    status,
                    t,
                    quantum,
                    trajectories,
                    checkpoint_count,
                    done,
                    state,
                    p,
                )
                # All have read it before it is written.
                tl.debug_barrier()
                tl.store(parked + t * 3 + 2, until.to(tl.int64))
        if state == _GOING:
            # How it stands.
            write_rows(
                checkpoint_count,
                checkpoint_count + 1,
                logits,
                ring,
                window,
                preds,
                q_halt,
                residual,
                score,
                steps,
                status,
                t,
                quantum,
                trajectories,
                checkpoint_count,
                done,
                state,
                p,
            )
        copy_logits(logits, quantum, final, t, done, state, p)
        goes_on = (state == _GOING).to(tl.int64)
        tl.debug_barrier()
        tl.store(parked + t * 3, done * goes_on)
        tl.store(parked + t * 3 + 1, 0, mask=goes_on == 0)
        tl.store(parked + t * 3 + 2, 0, mask=goes_on == 0)
        # The next trajectory clears what this one's threads still read.
        tl.debug_barrier()
        tl.store(control + 1, tl.atomic_add(counters + _FINISHED, 1 - goes_on) + 1 - goes_on)
        place = tl.atomic_add(counters + _QUEUE, 1)
