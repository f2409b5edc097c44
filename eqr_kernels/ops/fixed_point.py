"""The whole iteration: every trajectory to its end, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require, require_cuda
from eqr_kernels.ops.operator import Operator, PackedWeights
from eqr_kernels.run_rules import RULE_FIELDS, RunRules


class FixedPointOutput(NamedTuple):
    """What `fixed_point` gives: N puzzles, T = N * breadth trajectories, C checkpoints, S tokens, V vocabulary.

    Trajectory t is restart t % breadth of puzzle t // breadth. A status is a number of `eqr_kernels.Status`; at a
    checkpoint, -1 is a trajectory that was still going. One that ended before a checkpoint is there as it ended.
    """

    logits: Tensor  # float32 [N, S, V], the winner's
    winner: Tensor  # int64 [N], the restart that `select` chooses
    preds: Tensor  # int64 [T, S]
    q_halt: Tensor  # float32 [T]
    residual: Tensor  # float32 [T]
    score: Tensor  # float32 [T]
    steps: Tensor  # int64 [T]
    status: Tensor  # int64 [T]
    at_preds: Tensor  # int64 [C, T, S]
    at_q_halt: Tensor  # float32 [C, T]
    at_residual: Tensor  # float32 [C, T]
    at_score: Tensor  # float32 [C, T]
    at_steps: Tensor  # int64 [C, T]
    at_status: Tensor  # int64 [C, T]
    residuals: Tensor  # float32 [T, depth] with trace, NaN after a trajectory's end; else [0]
    z_H: Tensor  # float32 [N, S, d], the winner's state with keep_states, zero where it never ran; else [0]
    z_L: Tensor  # the same


class StartStates(NamedTuple):
    """Where the T trajectories of a run start, and what they draw their noise from."""

    z_H: Tensor  # float32 [T, S, d]
    z_L: Tensor  # float32 [T, S, d]
    rng: Tensor  # int64 [T, 4], see `eqr_kernels.noise`: seed, restart, id, outer steps done


class TurnCells(NamedTuple):
    """Where the cells of N puzzles are: before the first turn as the puzzle has them, after the v-th as number v % V of
    V arrangements has them. The states of its trajectories move with them."""

    cells: Tensor  # int64 [N, V, S], the puzzle's cell that each cell shows
    every: int  # outer steps between turns, at least 1


Ended = Callable[[int, int, int, int, float, float, float, list[int]], object]
"""(puzzle, restart, status, steps, residual, score, q_halt, preds [S]) of a trajectory that has ended."""


def fixed_point(
    packed: PackedWeights,
    tokens: Tensor,
    ids: Tensor,
    control: Tensor,
    rules: RunRules,
    *,
    start: StartStates | None = None,
    keep_states: bool = False,
    turns: TurnCells | None = None,
    ask: Callable[[], object] | None = None,
    ended: Ended | None = None,
) -> FixedPointOutput:
    """Iterates T = N * breadth trajectories, each to its end, in one call on torch's threads or on a CUDA device.

    The rules are those of `eqr_kernels.solver.solve`. The result does not depend, bit for bit, on the number of
    threads, on `slots` or on the other rows, but for the steps and status of the losers of a race.

    On a CUDA device the op only enqueues the run on the current stream and returns; it may be captured in a graph.

    Args:
        packed: of `pack_weights`, for the instruction set or the layout that it was packed with.
        tokens: int64 [N, S] in 0..V-1 (on a CUDA device one out of range ends all work there, as with torch's own
            indexing). ids: int64 [N], key the random stream. All contiguous, and all on CPU or on one CUDA device.
        control: int64 [3], zeros; written while the op runs, and readable and writable from another thread: [0] cancels
            what is left when it is not 0, [1] counts the trajectories that have ended, [2] the outer steps spent. For
            a run on a CUDA device in page-locked memory (`pin_memory=True`), or on the device where nobody looks at it;
            its counts may then come out of order.
        rules: at most 64 checkpoints on a CUDA device.
        start: contiguous, where the tokens are; None draws each trajectory's start. On CPU only.
        keep_states: also give the winners' states. On CPU only.
        turns: contiguous, where the tokens are, and not with `keep_states`; answers and logits are of the puzzles' own
            cells. On CPU only.
        ask: called now and then from this thread while the op runs; returning False cancels what is left. On CPU only.
        ended: called from this thread for each trajectory, soon after it has ended. On CPU only.

    Raises:
        RuntimeError: there is no extension, or none for this device.
        TypeError, ValueError: an argument is not as above.
        BaseException: whatever `ask`, `ended` or the handler of a signal raised (KeyboardInterrupt on Ctrl-C) once the
            op has stopped, which takes an outer step. Not under torch.compile, where the op runs to its end.
    """
    extension = require()
    require_cuda(tokens)
    check_arguments(packed, tokens, ids, control)

    def run() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.eqr_kernels.fixed_point.default(
            packed.data,
            tokens,
            ids,
            control,
            *packed.operator,
            *rules.in_order(),
            *(start or NO_START),
            keep_states,
            *(turns or NO_TURNS),
        )
        return result

    on_cpu = tokens.device.type == "cpu"
    if (ask is not None or ended is not None) and not on_cpu:
        name = "ask" if ended is None else "ended"
        raise ValueError(f"{name} is for runs on CPU: a CUDA op returns at once; look at control meanwhile")
    polled = on_cpu and not torch.compiler.is_compiling()
    return FixedPointOutput(*(extension.with_poll(run, ask, ended) if polled else run()))


NO_START = (None, None, None)
NO_TURNS = (None, 0)


def trajectory_bytes(packed: PackedWeights, window: int = 3) -> int:
    """Bytes that one trajectory in flight takes in `fixed_point`: its state, its scratch space and its last scores.

    Args:
        packed: of `pack_weights`.
        window: as in `fixed_point`, 1 to 2**24 - 1.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    check.packed(packed.data)
    return int(torch.ops.eqr_kernels.trajectory_bytes.default(packed.data, window))


def check_arguments(packed: PackedWeights, tokens: Tensor, ids: Tensor, control: Tensor) -> None:
    """Of a run; see `fixed_point`."""
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"packed must be PackedWeights, got {type(packed).__name__}; make it with pack_weights")
    packed.operator.check()
    like = ("tokens", tokens)
    check.tensor("tokens", tokens, torch.int64, ("N", packed.operator.sizes[0]), like)
    check.packed(packed.data, like)
    check.tensor("ids", ids, torch.int64, (tokens.shape[0],), like)
    # On a CUDA device it may also be of the host, whose memory the device sees: the op says which.
    check.tensor("control", control, torch.int64, (3,), like if control.device.type == "cuda" else None)


@register_fake("fixed_point")
def _(
    packed: Tensor,
    tokens: Tensor,
    ids: Tensor,
    control: Tensor,
    sizes: Sequence[int],
    constants: Sequence[float],
    fixed_start: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    check_arguments(PackedWeights(packed, Operator(sizes, constants, fixed_start)), tokens, ids, control)
    in_order, given = arguments[: len(RULE_FIELDS)], arguments[len(RULE_FIELDS) :]
    keep_states = len(given) > 3 and given[3]  # torch leaves out last arguments that are the defaults
    rules, puzzles, length, vocabulary = RunRules(*in_order), tokens.shape[0], sizes[0], sizes[2]
    trajectories, depths = puzzles * rules.breadth, len(rules.checkpoints)

    def recorded(*sizes: int) -> list[Tensor]:
        preds = tokens.new_empty((*sizes, length))
        of_float = [tokens.new_empty(sizes, dtype=torch.float32) for _ in range(3)]
        return [preds, *of_float, tokens.new_empty(sizes), tokens.new_empty(sizes)]

    logits = tokens.new_empty((puzzles, length, vocabulary), dtype=torch.float32)
    residuals = tokens.new_empty((trajectories, rules.depth) if rules.trace else 0, dtype=torch.float32)
    end, at = recorded(trajectories), recorded(depths, trajectories)
    z_H, z_L = (tokens.new_empty((puzzles, length, sizes[1]) if keep_states else 0, dtype=torch.float32) for _ in "HL")
    return logits, tokens.new_empty(puzzles), *end, *at, residuals, z_H, z_L


@register_fake("trajectory_bytes")
def _(packed: Tensor, window: int) -> Tensor:
    check.packed(packed)
    return packed.new_empty((), dtype=torch.int64)
