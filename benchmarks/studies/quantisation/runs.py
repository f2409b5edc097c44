"""All trajectories of a model at one precision, step by step, and how those of two precisions differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.studies.quantisation.paired import compare_answers, counted
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.coupling import auroc
from eqr_kernels.studies.tolerance import first_converged
from eqr_kernels.studies.types import Bools, Floats, Ints, Progress
from eqr_kernels.trajectory import Status

FLOOR_STEPS = 8
"""Last steps over which the residual floor is a median."""
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Run:
    """B trajectories of each of N puzzles over D outer steps, none of them halted.

    Attributes:
        tol: residual at which a trajectory counts as settled.
        residuals: float32 [N, B, D], NaN after a trajectory diverged.
        right: bool [N, B, D], the answer after that many steps is right.
        answers: int64 [N, B, S], at the end.
        diverged: bool [N, B].
        selected: bool [N], the answer that the rule "residual" selects at the end is right.
        backend, backend_reason: what ran, and why.
    """

    tol: float
    residuals: Floats
    right: Bools
    answers: Ints
    diverged: Bools
    selected: Bools
    backend: str
    backend_reason: str

    @property
    def trajectories(self) -> int:
        return int(self.diverged.size)

    @property
    def ended_right(self) -> Bools:
        """bool [N, B]."""
        return self.right[..., -1]

    @cached_property
    def settled(self) -> Bools:
        """bool [N, B]: the last residual is at most the tolerance."""
        last: Bools = ~self.diverged & (self.residuals[..., -1] <= np.float32(self.tol))
        return last

    @cached_property
    def halts(self) -> tuple[Ints, Bools]:
        """steps int64 [N, B], met bool [N, B]: where halting at the tolerance would have stopped each, if anywhere."""
        n, b, d = self.residuals.shape
        steps, met = first_converged(self.residuals.reshape(-1, d), self.tol)
        return steps.reshape(n, b), met.reshape(n, b)


def run(
    model: EquilibriumReasoner,
    inputs: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    *,
    depth: int,
    breadth: int,
    tol: float,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Runs every trajectory to the full depth; which puzzles are in memory at a time changes no answer.

    Args:
        inputs, labels: integers [N, S].
        progress: called with (outer steps spent, outer steps in all).
        options: further arguments of `solve` (seed, noise_scale, backend, precision, slots).

    Raises:
        As `solve`. A CUDA device records 64 depths at most, and so takes no greater depth.
    """
    n, tokens = inputs.shape
    # Each trajectory's answer, in int64, and six numbers at each depth, twice, as an op's output is copied.
    chunk = max(1, _CHUNK_BYTES // (breadth * 2 * (depth + 1) * (8 * tokens + 40)))
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for start in range(0, n, chunk):
        rows, wanted = inputs[start : start + chunk], labels[start : start + chunk]

        def shown(_finished: int, _trajectories: int, spent: int, before: int = start * depth * breadth) -> None:
            if progress is not None:
                progress(before + spent, n * depth * breadth)

        result = model.solve(
            torch.from_numpy(rows.astype(np.int64)),
            depth=depth,
            breadth=breadth,
            halt="none",
            select="residual",
            checkpoints=range(1, depth + 1),
            trace=True,
            return_all=True,
            progress=shown,
            **options,
        )
        assert result.residuals is not None and result.all_preds is not None
        answers = [result.at[k].all_preds.cpu().numpy() for k in range(1, depth + 1)]
        open_labels = wanted == 0
        right = np.stack([((a == wanted[:, None]) | open_labels[:, None]).all(2) for a in answers], 2)
        selected = ((result.preds.cpu().numpy() == wanted) | open_labels).all(1)
        diverged = (result.all_status == Status.DIVERGED).cpu().numpy()
        parts.append((result.residuals.cpu().numpy(), right, answers[-1], diverged, selected))
    residuals, right, last, diverged, selected = (np.concatenate(field) for field in zip(*parts, strict=True))
    return Run(tol, residuals, right, last, diverged, selected, result.backend, result.backend_reason)


def alone(run: Run) -> dict[str, Any]:
    """What a run tells by itself: accuracy, residual floor, what settles, whether the residual can be trusted."""
    steps, met = run.halts
    at_halt = np.take_along_axis(run.right, steps[..., None] - 1, 2)[..., 0]
    last = np.where(run.diverged | np.isnan(run.residuals[..., -1]), np.inf, run.residuals[..., -1])
    told = auroc(last.reshape(-1), run.ended_right.reshape(-1))
    settled, n = run.settled, len(run.selected)
    found = counted(int(run.selected.sum()), n)
    return {
        "accuracy": {"correct": found.pop("count"), **found},
        "trajectories_right": counted(int(run.ended_right.sum()), run.trajectories),
        "residual_floor": _median(run.residuals[settled][:, -FLOOR_STEPS:]),
        "settled_share": float(settled.mean()),
        "settled": counted(int(settled.sum()), run.trajectories),
        "settled_right": counted(int((settled & run.ended_right).sum()), int(settled.sum())),
        "diverged": int(run.diverged.sum()),
        "auroc": None if math.isnan(told) else told,
        "tolerance": {
            "tol": run.tol,
            "fired": counted(int(met.sum()), run.trajectories),
            "right_when_fired": counted(int((met & at_halt).sum()), int(met.sum())),
            "mean_steps": float(steps.mean()),
            "median_steps_when_fired": _median(steps[met]),
        },
        "backend": run.backend,
        "backend_reason": run.backend_reason,
    }


def against(base: Run, other: Run) -> dict[str, Any]:
    """How a run differs from the baseline's on the same puzzles, starts and noise.

    A trajectory has changed basin if it settled in both with different answers, or in one only. Trajectories of one
    puzzle are alike, so that intervals over trajectories are too narrow; how many puzzles are touched stands beside.
    """
    if base.answers.shape != other.answers.shape:
        raise ValueError(f"the runs must be of the same trajectories, got {base.answers.shape}, {other.answers.shape}")
    both = base.settled & other.settled
    elsewhere = both & (base.answers != other.answers).any(2)
    only_base, only_here = base.settled & ~other.settled, other.settled & ~base.settled
    changed = elsewhere | only_base | only_here
    total = base.trajectories

    def share(mask: Bools, of: int) -> dict[str, Any]:
        return {**counted(int(mask.sum()), of), "puzzles": int(mask.any(1).sum())}

    return {
        "paired": compare_answers(base.selected, other.selected),
        "changed_basin": share(changed, total),
        "settled_elsewhere": share(elsewhere, int(both.sum())),
        "settled_in_baseline_only": share(only_base, total),
        "settled_here_only": share(only_here, total),
        "right_to_wrong": share(base.ended_right & ~other.ended_right, total),
        "wrong_to_right": share(other.ended_right & ~base.ended_right, total),
        "more_steps_to_settle": _more_steps(base, other),
    }


def _more_steps(base: Run, other: Run) -> dict[str, Any]:
    """Steps to the tolerance here over those of the baseline, where both meet it."""
    (before, met), (after, also) = base.halts, other.halts
    both = met & also
    more = (after - before)[both]
    return {"trajectories": int(both.sum()), "mean": float(more.mean()) if both.any() else None}


def _median(values: npt.NDArray[Any]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None
