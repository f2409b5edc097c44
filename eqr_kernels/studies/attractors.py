"""Which attractors a puzzle has, judged by where its restarts end: the four modes of EqR (arXiv 2605.21488)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.types import Bools, Ints

MODES = {
    "no correct attractor": "no restart ends right",
    "competing": "some restarts end right, and some have settled on a wrong answer",
    "narrow": "some restarts end right, none has settled on a wrong answer, and too few have settled on the right one",
    "broad": "(nearly) all restarts have settled on the right answer",
}
"""What each mode means, from worst to best."""

BROAD = 0.95
"""Least share of a puzzle's restarts that must settle on the right answer for its basin to count as broad."""


@dataclass(frozen=True)
class Modes:
    """Where the B restarts of each of M puzzles ended.

    Attributes:
        puzzle: int64 [M], rising: the rows that were judged. A puzzle without labels is not.
        mode: [M], of `MODES`.
        right, settled, settled_right: int64 [M], restarts that ended right, that had settled, and both.
        restarts: B.
        broad: the share that was asked for.
    """

    puzzle: Ints
    mode: list[str]
    right: Ints
    settled: Ints
    settled_right: Ints
    restarts: int
    broad: float

    def counts(self, groups: npt.ArrayLike | None = None) -> dict[str, dict[str, int]]:
        """How many puzzles are in each mode, for each group in its order of appearance, or all in the group "all".

        Args:
            groups: a name for each puzzle of the set, [N >= M].
        """
        names = ["all"] * len(self.mode) if groups is None else np.asarray(groups)[self.puzzle].tolist()
        counts = {name: dict.fromkeys(MODES, 0) for name in dict.fromkeys(names)}
        for name, mode in zip(names, self.mode, strict=True):
            counts[name][mode] += 1
        return counts


def modes(
    exact: npt.ArrayLike, settled: npt.ArrayLike, *, labelled: npt.ArrayLike | None = None, broad: float = BROAD
) -> Modes:
    """The mode of each puzzle. Each is in just one: the first of these that holds.

    "no correct attractor": no restart ends right. "broad": at least `broad` of them have settled and are right.
    "competing": some have settled and are wrong. "narrow": the rest, in which some end right and none settled wrong.
    With few restarts this says little: a basin that none of them meets is not seen.

    Args:
        exact, settled: bool [N, B], of each restart at the end.
        labelled: bool [N], puzzles to judge; by default all.
        broad: share in (0, 1].

    Raises:
        ValueError: the shapes do not fit, or `broad` is out of range.
    """
    right, still = np.asarray(exact, bool), np.asarray(settled, bool)
    if right.ndim != 2 or right.shape != still.shape or not right.shape[1]:
        raise ValueError(f"exact and settled must both be [N, B >= 1], got shapes {right.shape} and {still.shape}")
    known: Bools = np.ones(len(right), bool) if labelled is None else np.asarray(labelled, bool)
    if known.shape != right.shape[:1]:
        raise ValueError(f"labelled must be [N] = [{len(right)}], got shape {known.shape}")
    if not 0 < broad <= 1:
        raise ValueError(f"broad must be a share above 0 and up to 1, got {broad}")
    puzzle = np.flatnonzero(known)
    right, still = right[puzzle], still[puzzle]
    restarts = right.shape[1]
    both, settled_wrong = (right & still).sum(1), (still & ~right).any(1)
    # The least whole number of restarts; the slack is for shares that are not exact in binary.
    enough = both >= broad * restarts - 1e-9
    mode = np.select(
        [~right.any(1), enough, settled_wrong], ["no correct attractor", "broad", "competing"], "narrow"
    ).tolist()
    return Modes(puzzle, mode, right.sum(1), still.sum(1), both, restarts, broad)
