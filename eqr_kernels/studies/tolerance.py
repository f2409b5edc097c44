"""The loosest tolerance that costs no accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.noise import noise_floor
from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import at_ends, ends_when_halted

NOISE_MULTIPLE = 2.0


def provisional_tolerance(noise_scale: float) -> float:
    """A tolerance where none was calibrated: `NOISE_MULTIPLE` times `noise_floor`.

    Raises:
        ValueError: there is no noise, so nothing to take it from.
    """
    if not noise_scale > 0:
        raise ValueError(
            "nothing tells when a trajectory has settled: no --tol, no tolerance in the model's card, and no noise "
            "whose floor could stand in for it; give --tol, or find one with `eqr calibrate` (--write stores it)"
        )
    return NOISE_MULTIPLE * noise_floor(noise_scale)


@dataclass(frozen=True)
class Tolerance:
    """What halting at a tolerance does to the N puzzles of a calibration.

    Attributes:
        tol: the tolerance.
        correct: puzzles answered right.
        lost, gained: right only at the full depth, and right only here.
        mean_steps: outer steps of a puzzle.
        converged: puzzles that met the tolerance; right_when_converged: those of them that are right.
    """

    tol: float
    correct: int
    lost: int
    gained: int
    mean_steps: float
    converged: int
    right_when_converged: int


@dataclass(frozen=True)
class Calibration:
    """The candidates, tightest first, and the chosen one.

    Attributes:
        puzzles, depth: N and D.
        correct: puzzles right at the full depth.
        candidates: what each tolerance does.
        chosen: the loosest that, like all tighter ones, loses no more than it may; None when no tolerance that some
            trajectory meets does.
    """

    puzzles: int
    depth: int
    correct: int
    candidates: tuple[Tolerance, ...]
    chosen: Tolerance | None


def calibrate(
    recording: Recording,
    *,
    candidates: Sequence[float] | None = None,
    max_loss: float = 0.0,
    trust: float = 0.0,
    patience: int = 1,
    floor: float = 0.0,
) -> Calibration:
    """Finds the loosest tolerance up to which halting answers no fewer puzzles right than the full depth does.

    With `trust` it must also mean something to have converged: of the puzzles that do, at least that share is right.

    Every tighter candidate has to hold too: a looser one that makes up by chance for what a tighter one loses is no
    safer than it.

    Args:
        recording: without halting; its first trajectory of each puzzle is what is looked at.
        candidates: tolerances to try; by default `tolerance_grid` of its residuals.
        max_loss: share of the N puzzles that halting may lose, net of those that it gains.
        trust: least share of the converged puzzles that must be right.
        patience: of the halting rule.
        floor: tolerances below it are not tried, such as those that the noise keeps out of reach.

    Raises:
        ValueError: `max_loss` or `trust` is not in 0..1, there is no candidate, or nothing is right at the full depth,
            so that every tolerance would do.
    """
    for name, share in (("max_loss", max_loss), ("trust", trust)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share in 0..1, got {share}")
    puzzles, correct = len(recording), int(recording.correct[:, 0, -1].sum())
    if not correct:
        raise ValueError(
            f"none of the {puzzles} puzzles is right at depth {recording.depth}, so no tolerance can be told from "
            "another; calibrate on puzzles that the model can solve"
        )
    grid = tolerance_grid(recording.residuals[:, 0]) if candidates is None else candidates
    tried = sorted({float(tol) for tol in grid if tol >= floor})
    if not tried:
        raise ValueError(f"no residual or candidate lies at or above floor={floor:g}, so no tolerance can be chosen")
    measured = tuple(_measure(recording, tol, patience) for tol in tried)
    least = correct - max_loss * puzzles - 1e-9

    def holds(t: Tolerance) -> bool:
        return t.correct >= least and t.right_when_converged >= trust * t.converged

    held = list(itertools.takewhile(holds, measured))
    # A tolerance that nothing meets loses nothing either, and is of no use.
    chosen = held[-1] if held and held[-1].converged else None
    return Calibration(puzzles, recording.depth, correct, measured, chosen)


def _measure(recording: Recording, tol: float, patience: int) -> Tolerance:
    ends = ends_when_halted(recording, "residual", tol=tol, patience=patience, breadth=1)
    right, converged, full = at_ends(recording.correct, ends)[:, 0], ends.settled[:, 0], recording.correct[:, 0, -1]
    # One that diverges is counted as if it had gone on: it never converges, and answers nothing.
    steps = np.where(converged, ends.steps[:, 0], recording.depth)
    return Tolerance(
        tol,
        int(right.sum()),
        int((full & ~right).sum()),
        int((right & ~full).sum()),
        float(steps.mean()),
        int(converged.sum()),
        int((right & converged).sum()),
    )


def tolerance_grid(residuals: npt.ArrayLike, per_decade: int = 40) -> list[float]:
    """Round tolerances (three digits) from the least to the greatest finite residual, evenly spaced on a log scale."""
    r = np.asarray(residuals, np.float64)
    r = r[np.isfinite(r) & (r > 0)]
    if not r.size:
        return []
    first, last = (math.floor(math.log10(x) * per_decade) for x in (r.min(), r.max()))
    return sorted({float(f"{10 ** (k / per_decade):.2e}") for k in range(first, last + 2)})
