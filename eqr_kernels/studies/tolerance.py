"""The tolerance at which converged is a promise, and the loosest that costs no accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import at_ends, ends_when_halted
from eqr_kernels.studies.statistics import wilson_interval

TRUST = 0.99
"""Share of the puzzles that meet a tolerance that must be right for "converged" to be a promise."""
FEWEST_SETTLED = 100
"""Puzzles that must meet a tolerance for that share to be told: with fewer a single wrong one is more than 1 %."""
AT_ONCE = 0.5
"""Share of the puzzles that meet a tolerance at their first step from which on it tells nothing of coming to rest."""
WHOLE_STATE = 1.0
"""Residual of a step as long as the state that it ends in: nothing that moves so much has settled."""


@dataclass(frozen=True)
class Tolerance:
    """What halting at a tolerance does to the N puzzles of a calibration.

    Attributes:
        tol: the tolerance.
        correct: puzzles answered right.
        lost, gained: right only at the full depth, and right only here.
        mean_steps: outer steps of a puzzle.
        converged: puzzles that met the tolerance; right_when_converged: those of them that are right; at_once: those
            that met it as early as can be, at the first step.
    """

    tol: float
    correct: int
    lost: int
    gained: int
    mean_steps: float
    converged: int
    right_when_converged: int
    at_once: int

    @property
    def right_share(self) -> float:
        """Of the converged puzzles, NaN where there are none."""
        return self.right_when_converged / self.converged if self.converged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `right_share`."""
        return wilson_interval(self.right_when_converged, self.converged)


@dataclass(frozen=True)
class Calibration:
    """The candidates, tightest first, and the chosen ones.

    Attributes:
        puzzles, depth: N and D.
        correct: puzzles right at the full depth.
        candidates: what each tolerance does.
        trusted: the one for `tol="auto"`, at which converged is a promise; fast: the one for `tol="fast"`, which costs
            no answer. None where there is none.
        missing: why there is no trusted one; "" where there is.
    """

    puzzles: int
    depth: int
    correct: int
    candidates: tuple[Tolerance, ...]
    trusted: Tolerance | None
    fast: Tolerance | None
    missing: str


def check_shares(**shares: float) -> None:
    """Raises a ValueError that names the first that is no share in 0..1."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share in 0..1, got {share}")


def calibrate(
    recording: Recording,
    *,
    candidates: Sequence[float] | None = None,
    max_loss: float = 0.0,
    trust: float = TRUST,
    fewest: int = FEWEST_SETTLED,
    patience: int = 1,
    floor: float = 0.0,
) -> Calibration:
    """Finds two tolerances.

    fast: the loosest up to which halting answers no fewer puzzles right than the full depth does.
    trusted: the loosest up to which, besides, of the puzzles that meet it at least the share `trust` is right. That is
    the share that was counted, not the lower end of its interval, and it counts from `fewest` puzzles on.

    Every tighter candidate has to hold too: a looser one that makes up by chance for what a tighter one loses is no
    safer than it. A tolerance that half of the puzzles meet at their first step is none: it is as large as the step
    from a random start, and tells nothing of coming to rest. Nor is one of `WHOLE_STATE` or more, which few puzzles
    may all survive.

    Args:
        recording: without halting; its first trajectory of each puzzle is what is looked at.
        candidates: tolerances to try; by default `tolerance_grid` of its residuals.
        max_loss: share of the N puzzles that halting may lose, net of those that it gains.
        trust: least share of the converged puzzles that must be right. fewest: of them, to tell.
        patience: of the halting rule.
        floor: tolerances below it are not tried, such as those that the noise keeps out of reach.

    Raises:
        ValueError: `max_loss` or `trust` is not in 0..1, there is no candidate, or nothing is right at the full depth,
            so that every tolerance would do.
    """
    check_shares(max_loss=max_loss, trust=trust)
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

    def loses_nothing(t: Tolerance) -> bool:
        return t.correct >= least

    def is_right(t: Tolerance) -> bool:
        return t.converged < fewest or t.right_when_converged >= trust * t.converged - 1e-9

    held = list(itertools.takewhile(loses_nothing, measured))
    # A tolerance that nothing meets loses nothing either, and is of no use.
    fast = held[-1] if held and held[-1].converged else None
    met = [t for t in itertools.takewhile(is_right, held) if t.converged >= fewest and t.tol < WHOLE_STATE]
    trusted = met[-1] if met else None
    missing = "" if trusted else _why_not(correct, held, measured, trust, fewest)
    if fast is not None and _at_once(fast, puzzles):
        trusted = None if trusted is None or _at_once(trusted, puzzles) else trusted
        if trusted is None:
            missing = (
                f"{fast.at_once} of {puzzles} calibration puzzles met {fast.tol:g} at their first step and no answer "
                "was lost, so no tolerance of this model means anything"
            )
        fast = trusted
    if fast is not None and fast.tol >= WHOLE_STATE:
        fast = next((t for t in reversed(held) if t.tol < WHOLE_STATE and t.converged), None)
        missing = (
            missing if fast else f"nothing settles at a tolerance below {WHOLE_STATE:g}, a step as long as the state"
        )
    return Calibration(puzzles, recording.depth, correct, measured, trusted, fast, missing)


def _why_not(correct: int, held: Sequence[Tolerance], measured: Sequence[Tolerance], trust: float, fewest: int) -> str:
    """Why no tolerance can be trusted, in the calibration's own numbers."""
    if correct < trust * fewest:
        return f"only {correct} calibration puzzles were right at the full depth, and {fewest} must settle to tell"
    enough = [t for t in held if t.converged >= fewest]
    if enough:
        t = min(held[-1], enough[0], key=lambda t: t.right_share)
        right = (
            f"{t.right_when_converged} of the {t.converged} calibration puzzles that settled at {t.tol:g} were right"
        )
        return f"only {right}, and {100 * trust:g} % are wanted"
    if any(t.converged >= fewest for t in measured):
        return f"every tolerance that {fewest} calibration puzzles met cost answers"
    settled = max(t.converged for t in measured)
    return f"only {settled} calibration puzzles settled, and {fewest} must to tell"


def _at_once(t: Tolerance, puzzles: int) -> bool:
    return t.at_once >= AT_ONCE * puzzles


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
        int((converged & (ends.steps[:, 0] <= patience)).sum()),
    )


def tolerance_grid(residuals: npt.ArrayLike, per_decade: int = 40) -> list[float]:
    """Round tolerances (three digits) from the least to the greatest finite residual, evenly spaced on a log scale."""
    r = np.asarray(residuals, np.float64)
    r = r[np.isfinite(r) & (r > 0)]
    if not r.size:
        return []
    first, last = (math.floor(math.log10(x) * per_decade) for x in (r.min(), r.max()))
    return sorted({float(f"{10 ** (k / per_decade):.2e}") for k in range(first, last + 2)})
