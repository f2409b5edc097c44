"""All trajectories of a model at one precision, step by step, and how those of two precisions differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.studies.quantisation.paired import clustered_difference, compare_answers, counted
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.recording import Recording, record, recordable_depths
from eqr_kernels.studies.replay import Ends, at_ends, correct_grid, ends_when_halted, settled
from eqr_kernels.studies.statistics import auroc
from eqr_kernels.studies.types import Bools, Codes, Progress

FLOOR_STEPS = 8
"""Last steps over which the residual floor is a median."""


@dataclass(frozen=True)
class Run:
    """B trajectories of each of N puzzles, recorded without halting.

    Attributes:
        tol: residual at which a trajectory counts as settled.
        recording: see `Recording`.
    """

    tol: float
    recording: Recording

    @property
    def trajectories(self) -> int:
        return int(self.diverged.size)

    @property
    def diverged(self) -> Bools:
        """bool [N, B]."""
        return self.recording.diverged[..., -1]

    @property
    def ended_right(self) -> Bools:
        """bool [N, B]."""
        return self.recording.correct[..., -1]

    @property
    def answers(self) -> Codes:
        """uint64 [N, B], at the end; see `answer_codes`."""
        return self.recording.answer[..., -1]

    @cached_property
    def selected(self) -> Bools:
        """bool [N], the answer that the rule "residual" selects at the end is right."""
        return correct_grid(self.recording, [self.recording.depth], [self.recording.breadth])[:, 0, 0, 0]

    @cached_property
    def settled(self) -> Bools:
        """bool [N, B]: the last residual is at most the tolerance."""
        return settled(self.recording, self.tol)[..., -1]

    @cached_property
    def halts(self) -> Ends:
        """Where halting at the tolerance would have stopped each, if anywhere."""
        return ends_when_halted(self.recording, "residual", tol=self.tol)


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
    """Runs every trajectory to the full depth.

    Args:
        inputs, labels: integers [N, S].
        progress: called with (outer steps spent, outer steps in all).
        options: further arguments of `solve` (seed, noise_scale, backend, precision, slots).

    Raises:
        As `solve`.
    """
    ran_by = {name: options[name] for name in ("backend", "precision") if name in options}
    depths = recordable_depths(model, depth, **ran_by)
    recording = record(model, inputs, labels, depths=depths, breadth=breadth, progress=progress, **options)
    return Run(tol, recording)


def alone(run: Run) -> dict[str, Any]:
    """What a run tells by itself: accuracy, residual floor, what settles, whether the residual can be trusted."""
    met, at_halt = run.halts.settled, at_ends(run.recording.correct, run.halts)
    steps = np.where(met, run.halts.steps, run.recording.depth)
    residuals = run.recording.residuals
    last = np.where(run.diverged | np.isnan(residuals[..., -1]), np.inf, residuals[..., -1])
    area = auroc(last.reshape(-1), run.ended_right.reshape(-1))
    still, n = run.settled, len(run.selected)
    right = counted(int(run.selected.sum()), n)
    return {
        "accuracy": {"correct": right.pop("count"), **right},
        "trajectories_right": counted(int(run.ended_right.sum()), run.trajectories),
        "residual_floor": _median(residuals[still][:, -FLOOR_STEPS:]),
        "settled_share": float(still.mean()),
        "settled": counted(int(still.sum()), run.trajectories),
        "settled_right": counted(int((still & run.ended_right).sum()), int(still.sum())),
        "diverged": int(run.diverged.sum()),
        "auroc": None if math.isnan(area) else area,
        "tolerance": {
            "tol": run.tol,
            "fired": counted(int(met.sum()), run.trajectories),
            "right_when_fired": counted(int((met & at_halt).sum()), int(met.sum())),
            "mean_steps": float(steps.mean()),
            "median_steps_when_fired": _median(steps[met]),
        },
        "backend": run.recording.backend,
        "backend_reason": run.recording.backend_reason,
    }


def against(base: Run, other: Run) -> dict[str, Any]:
    """How a run differs from the baseline's on the same puzzles, starts and noise; each settles at its own tolerance.

    A trajectory has changed basin if it settled in both with different answers, or in one only. Trajectories of one
    puzzle are alike, so that intervals over trajectories are too narrow; how many puzzles are touched stands beside.
    """
    if base.answers.shape != other.answers.shape:
        raise ValueError(f"the runs must be of the same trajectories, got {base.answers.shape}, {other.answers.shape}")
    both = base.settled & other.settled
    elsewhere = both & (base.answers != other.answers)
    only_base, only_here = base.settled & ~other.settled, other.settled & ~base.settled
    changed = elsewhere | only_base | only_here
    total = base.trajectories

    def share(mask: Bools, of: int) -> dict[str, Any]:
        return {**counted(int(mask.sum()), of), "puzzles": int(mask.any(1).sum())}

    return {
        "paired": compare_answers(base.selected, other.selected),
        "trajectories": clustered_difference(base.ended_right, other.ended_right, np.ones_like(base.ended_right)),
        "changed_basin": share(changed, total),
        "settled_elsewhere": share(elsewhere, int(both.sum())),
        "settled_in_baseline_only": share(only_base, total),
        "settled_here_only": share(only_here, total),
        "right_to_wrong": share(base.ended_right & ~other.ended_right, total),
        "wrong_to_right": share(other.ended_right & ~base.ended_right, total),
        "more_steps_to_settle": _more_steps(base, other),
    }


def right_kept(base: Run, reseeded: Run, other: Run) -> dict[str, Any] | None:
    """Of the trajectories that are right in the baseline, what stays right here less what does under another seed.

    None where those of fewer than two puzzles are right.
    """
    right = base.ended_right
    compared = clustered_difference(reseeded.ended_right, other.ended_right, right)
    if compared is None:
        return None
    lost = {"lost_here": other, "lost_by_seed": reseeded}
    counts = {name: counted(int((right & ~run.ended_right).sum()), int(right.sum())) for name, run in lost.items()}
    return {**counts, **compared}


def _more_steps(base: Run, other: Run) -> dict[str, Any]:
    """Steps to the tolerance here over those of the baseline, where both meet it."""
    both = base.halts.settled & other.halts.settled
    more = (other.halts.steps - base.halts.steps)[both]
    return {"trajectories": int(both.sum()), "mean": float(more.mean()) if both.any() else None}


def _median(values: npt.NDArray[Any]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None
