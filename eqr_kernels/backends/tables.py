"""What the compiled ops and the kernels give, as a recorder takes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eqr_kernels.backends.base import FixedPointProblem, Recorder
from eqr_kernels.ops import FixedPointOutput, Tables
from eqr_kernels.selection import select
from eqr_kernels.trajectory import Snapshot


def hand_over(result: FixedPointOutput, problem: FixedPointProblem, recorder: Recorder) -> None:
    """All trajectories of a run of `ops.fixed_point`."""
    _record(problem, recorder, result[8:14], result[2:8], result.residuals)
    recorder.winners(result.winner, result.logits, (result.z_H, result.z_L) if problem.keep_states else None)


def deliver(tables: Tables, problem: FixedPointProblem, recorder: Recorder) -> None:
    """All trajectories of a run whose tables are full."""
    p, recorded = problem, tables[:6]
    end = [table[-1] for table in recorded]
    _record(p, recorder, [table[:-1] for table in recorded], end, tables.residuals)
    preds, q_halt, _, score, steps, status = (field.unflatten(0, (-1, p.breadth)) for field in end)
    restart = select(p.select, preds, status, score, q_halt, steps)
    winner = torch.arange(len(restart), device=restart.device) * p.breadth + restart
    recorder.winners(restart, tables.logits[winner])


def _record(
    problem: FixedPointProblem, recorder: Recorder, at: Sequence[Tensor], end: Sequence[Tensor], residuals: Tensor
) -> None:
    """preds, q_halt, residual, score, steps, status: in `end` [T, ...], in `at` [C, T, ...]; residuals [T, depth]."""
    number = torch.arange(problem.trajectories, device=end[-1].device)

    def snapshot(preds: Tensor, *numbers: Tensor) -> Snapshot:
        return Snapshot(number, preds, None, *numbers)

    for i, depth in enumerate(problem.checkpoints):
        recorder.checkpoint(depth, snapshot(*(table[i] for table in at)))
    if problem.trace:
        recorder.residual(number[:, None], torch.arange(problem.depth, device=number.device), residuals)
    recorder.finished(snapshot(*end))
