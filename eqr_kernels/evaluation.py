"""How good a model is: exact accuracy by depth, its uncertainty, and the loosest tolerance that costs none of it.

Everything here returns numbers and prints nothing. Arrays are NumPy: N puzzles, S tokens, D or K depths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from eqr_kernels.modules import EquilibriumReasoner
from eqr_kernels.solve import SolveResult

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], object]
"""(outer steps spent, outer steps at most)"""

CHUNK = 1024
_Z95 = 1.959963984540054
RATING_BANDS = {
    "0": (0, 0),
    "1-9": (1, 9),
    "10-29": (10, 29),
    "30-99": (30, 99),
    "100-299": (100, 299),
    "300-999": (300, 999),
    "1000+": (1000, math.inf),
    "unknown": (-math.inf, -1),
}
"""Least and greatest rating of each band."""


# scoring -------------------------------------------------------------------------------------------------------------


def exact_match(preds: npt.ArrayLike, labels: npt.ArrayLike) -> Bools:
    """Whether every labelled token is right: integers [N, S] twice -> bool [N]. A row without any label is never right.

    Raises:
        ValueError: the shapes differ, or are not [N, S].
    """
    predicted, wanted = np.asarray(preds), np.asarray(labels)
    if predicted.ndim != 2 or predicted.shape != wanted.shape:
        raise ValueError(f"preds and labels must both be [N, S], got shapes {predicted.shape} and {wanted.shape}")
    labelled = wanted != 0
    right: Bools = ((predicted == wanted) | ~labelled).all(1) & labelled.any(1)
    return right


def wilson_interval(successes: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 % by default; (0, 1) when nothing was counted.

    (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.)

    Raises:
        ValueError: not 0 <= successes <= total.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes must be in 0..total, got {successes} of {total}")
    if not total:
        return 0.0, 1.0
    p, zz = successes / total, z * z
    centre = (p + zz / (2 * total)) / (1 + zz / total)
    half = z / (1 + zz / total) * math.sqrt(p * (1 - p) / total + zz / (4 * total * total))
    # At the ends the formula is exact in real numbers only.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == total else min(1.0, centre + half)


@dataclass(frozen=True)
class Accuracy:
    """How many of `total` puzzles are right."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """NaN when there are none."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 %."""
        return wilson_interval(self.correct, self.total)


def by_group(exact: Bools, groups: Sequence[str] | npt.NDArray[np.str_]) -> dict[str, list[Accuracy]]:
    """Accuracy of each group at each depth: exact bool [N, K], a name for each puzzle [N] -> name -> K accuracies.

    Groups come in the order in which they first appear.
    """
    names = np.asarray(groups)
    if exact.ndim != 2 or names.shape != exact.shape[:1]:
        raise ValueError(f"exact must be [N, K] and groups [N], got shapes {exact.shape} and {names.shape}")
    parts = {name: exact[names == name] for name in dict.fromkeys(names.tolist())}
    return {name: [Accuracy(int(k), len(part)) for k in part.sum(0)] for name, part in parts.items()}


def rating_bands(rating: npt.ArrayLike) -> list[str]:
    """The name in `RATING_BANDS` of each rating, integers [N]."""
    return [
        next(name for name, (low, high) in RATING_BANDS.items() if low <= value <= high)
        for value in np.asarray(rating).tolist()
    ]


# running -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Answers at several depths of one run to the full depth.

    Attributes:
        depths: the K depths, rising.
        exact: bool [N, K], the selected answer is right.
        steps: int64 [N, B], steps to the tolerance (the full depth where it was not met), or None without one.
        converged: bool [N, B], the tolerance was met, or None without one.
        backend, backend_reason: what ran, and why.
    """

    depths: tuple[int, ...]
    exact: Bools
    steps: Ints | None
    converged: Bools | None
    backend: str
    backend_reason: str


def evaluate(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depths: Sequence[int],
    breadth: int = 1,
    tol: float | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Exact accuracy at several depths, from one run to the greatest without halting.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        depths: outer steps.
        breadth: trajectories of each puzzle; the answer at a depth is selected among them as they are there.
        tol: also find when each trajectory's residual meets this tolerance.
        chunk: puzzles in memory at a time; it changes no answer.
        progress: called now and then, at every outer step by the reference backend.
        options: further arguments of `solve` (select, window, seed, noise_scale, slots, backend, precision).

    Raises:
        As `solve`.
    """
    if not len(depths):
        raise ValueError("depths must name at least one depth, got none")
    depths = tuple(sorted(set(depths)))
    exact, steps, converged = [], [], []
    trace = tol is not None
    settings: dict[str, Any] = dict(depth=depths[-1], breadth=breadth, checkpoints=depths, trace=trace, **options)
    for answers, result in _in_chunks(model, inputs, labels, chunk, progress, **settings):
        exact.append(np.stack([exact_match(result.at[d].preds.cpu().numpy(), answers) for d in depths], 1))
        if tol is not None:
            assert result.residuals is not None
            met = [first_converged(result.residuals[:, b].cpu().numpy(), tol) for b in range(breadth)]
            steps.append(np.stack([m[0] for m in met], 1))
            converged.append(np.stack([m[1] for m in met], 1))
    return Evaluation(
        depths,
        np.concatenate(exact),
        np.concatenate(steps) if steps else None,
        np.concatenate(converged) if converged else None,
        result.backend,
        result.backend_reason,
    )


@dataclass(frozen=True)
class Trajectories:
    """One trajectory of each puzzle, step by step.

    Attributes:
        residuals: float32 [N, D], NaN after a trajectory diverged.
        exact: bool [N, D], the answer after that many steps is right.
        backend: what ran.
    """

    residuals: Floats
    exact: Bools
    backend: str


def trajectories(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depth: int,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    **options: Any,
) -> Trajectories:
    """Residual and correctness at every step of one run without halting: what `calibrate` chooses a tolerance from.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        chunk: puzzles in memory at a time; it changes no answer.
        options: further arguments of `solve` (seed, noise_scale, slots, backend, precision).
    """
    residuals, exact = [], []
    steps = range(1, depth + 1)
    settings: dict[str, Any] = dict(depth=depth, checkpoints=tuple(steps), trace=True, **options)
    for answers, result in _in_chunks(model, inputs, labels, chunk, progress, **settings):
        assert result.residuals is not None
        residuals.append(result.residuals[:, 0].cpu().numpy())
        exact.append(np.stack([exact_match(result.at[k].preds.cpu().numpy(), answers) for k in steps], 1))
    return Trajectories(np.concatenate(residuals), np.concatenate(exact), result.backend)


def _in_chunks(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    chunk: int,
    progress: Progress | None,
    *,
    depth: int,
    breadth: int = 1,
    **options: Any,
) -> Iterator[tuple[npt.NDArray[np.integer], SolveResult]]:
    """Each chunk's labels, and its result at the full depth without halting."""
    questions, answers = np.asarray(inputs), np.asarray(labels)
    if questions.ndim != 2 or not len(questions) or questions.shape != answers.shape:
        raise ValueError(
            f"inputs and labels must both be [N >= 1, S], got shapes {questions.shape} and {answers.shape}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total = len(questions) * depth * breadth
    for start in range(0, len(questions), chunk):
        before = start * depth * breadth

        def report(_finished: int, _trajectories: int, spent: int, before: int = before) -> None:
            if progress is not None:
                progress(before + spent, total)

        tokens = torch.from_numpy(questions[start : start + chunk].astype(np.int64))
        result = model.solve(tokens, depth=depth, breadth=breadth, halt="none", progress=report, **options)
        yield answers[start : start + chunk], result


# tolerance -----------------------------------------------------------------------------------------------------------


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
