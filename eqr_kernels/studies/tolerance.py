"""The loosest tolerance that costs no accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from eqr_kernels.studies.types import Bools, Floats, Ints


def first_converged(residuals: npt.ArrayLike, tol: float, patience: int = 1) -> tuple[Ints, Bools]:
    """When each trajectory halts under a tolerance: residuals float32 [N, D] -> steps int64 [N], converged bool [N].

    That is the first step that closes `patience` consecutive residuals <= tol; D, not converged, where there is none.
    """
    r = np.asarray(residuals, np.float32)
    if r.ndim != 2 or not r.shape[1]:
        raise ValueError(f"residuals must be [N, D >= 1], got shape {r.shape}")
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    below: Bools = r <= np.float32(tol)
    window = min(patience, r.shape[1])
    fires: Bools = np.asarray(sliding_window_view(below, window, axis=1).all(-1))  # [N, D - window + 1]
    converged: Bools = fires.any(1) & (patience <= r.shape[1])
    steps = np.where(converged, fires.argmax(1) + window, r.shape[1]).astype(np.int64)
    return steps, converged


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
    residuals: npt.ArrayLike,
    exact: npt.ArrayLike,
    *,
    candidates: Sequence[float] | None = None,
    max_loss: float = 0.0,
    trust: float = 0.0,
    patience: int = 1,
    floor: float = 0.0,
) -> Calibration:
    """Finds the loosest tolerance up to which halting answers no fewer puzzles right than the full depth does.

    With `trust` it must also mean something to have settled: of the trajectories that do, at least that share is right.

    Every tighter candidate has to hold too: a looser one that makes up by chance for what a tighter one loses is no
    safer than it.

    Args:
        residuals: float32 [N, D]; exact: bool [N, D], the answer after that many steps is right.
        candidates: tolerances to try; by default `tolerance_grid(residuals)`.
        max_loss: share of the N puzzles that halting may lose, net of those that it gains.
        trust: least share of the settled puzzles that must be right.
        patience: of the halting rule.
        floor: tolerances below it are not tried, such as those that the noise keeps out of reach.

    Raises:
        ValueError: the shapes differ, `max_loss` or `trust` is not in 0..1, there is no candidate, or nothing is right
            at the full depth, so that every tolerance would do.
    """
    r, right = np.asarray(residuals, np.float32), np.asarray(exact, bool)
    if r.ndim != 2 or r.shape != right.shape or not r.size:
        raise ValueError(f"residuals and exact must both be [N >= 1, D >= 1], got {r.shape} and {right.shape}")
    for name, share in (("max_loss", max_loss), ("trust", trust)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share in 0..1, got {share}")
    full = right[:, -1]
    if not full.any():
        raise ValueError(
            f"none of the {len(r)} puzzles is right at depth {r.shape[1]}, so no tolerance can be told from another; "
            "calibrate on puzzles that the model can solve"
        )
    tried = sorted({float(tol) for tol in (tolerance_grid(r) if candidates is None else candidates) if tol >= floor})
    if not tried:
        raise ValueError(f"no residual or candidate lies at or above floor={floor:g}, so no tolerance can be chosen")
    measured = tuple(_measure(r, right, tol, patience) for tol in tried)
    least = full.sum() - max_loss * len(r) - 1e-9

    def holds(t: Tolerance) -> bool:
        return t.correct >= least and t.right_when_converged >= trust * t.converged

    held = list(itertools.takewhile(holds, measured))
    # A tolerance that nothing meets loses nothing either, and is of no use.
    chosen = held[-1] if held and held[-1].converged else None
    return Calibration(len(r), r.shape[1], int(full.sum()), measured, chosen)


def _measure(residuals: Floats, exact: Bools, tol: float, patience: int) -> Tolerance:
    steps, converged = first_converged(residuals, tol, patience)
    right = exact[np.arange(len(steps)), steps - 1]
    full = exact[:, -1]
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
