"""Whether the restarts of a puzzle end with the same answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.types import Bools, Codes, Ints


@dataclass(frozen=True)
class Agreement:
    """How far the B restarts of each of N puzzles agree in their last answer. A diverged one agrees with none.

    Attributes:
        pairs, same: pairs of restarts of one puzzle that have not diverged, and those of them with the same answer.
        settled_pairs, settled_same: the same for pairs in which both have settled.
        distinct: int64 [N], different answers among the settled restarts of each puzzle.
        common_right, common_wrong, common_tied: labelled puzzles whose most common answer is right, is wrong, and of
            which several answers are the most common. Those whose restarts all diverged count as wrong.
    """

    pairs: int
    same: int
    settled_pairs: int
    settled_same: int
    distinct: Ints
    common_right: int
    common_wrong: int
    common_tied: int

    @property
    def share(self) -> float:
        """NaN where there are no pairs."""
        return self.same / self.pairs if self.pairs else math.nan

    @property
    def settled_share(self) -> float:
        """NaN where there are no pairs."""
        return self.settled_same / self.settled_pairs if self.settled_pairs else math.nan


def agreement(
    codes: npt.ArrayLike,
    exact: npt.ArrayLike,
    settled: npt.ArrayLike,
    diverged: npt.ArrayLike,
    labelled: npt.ArrayLike | None = None,
) -> Agreement:
    """The agreement of the restarts.

    Args:
        codes: uint64 [N, B], see `scoring.answer_codes`.
        exact, settled, diverged: bool [N, B].
        labelled: bool [N]; by default all.

    Raises:
        ValueError: the shapes do not fit.
    """
    answers = np.asarray(codes)
    right, still, lost = (np.asarray(field, bool) for field in (exact, settled, diverged))
    if answers.ndim != 2 or not answers.shape == right.shape == still.shape == lost.shape:
        raise ValueError(
            f"codes, exact, settled and diverged must all be [N, B], got shapes {answers.shape}, {right.shape}, "
            f"{still.shape} and {lost.shape}"
        )
    known = np.ones(len(answers), bool) if labelled is None else np.asarray(labelled, bool)
    if known.shape != answers.shape[:1]:
        raise ValueError(f"labelled must be [N] = [{len(answers)}], got shape {known.shape}")
    totals, distinct = np.zeros(4, np.int64), np.zeros(len(answers), np.int64)
    outcomes = {"right": 0, "wrong": 0, "tied": 0}
    for row, values in enumerate(answers):
        going = ~lost[row]
        counts = np.unique(values[going], return_counts=True)[1]
        of_settled = np.unique(values[going & still[row]], return_counts=True)[1]
        totals += [*_pairs(counts), *_pairs(of_settled)]
        distinct[row] = len(of_settled)
        if known[row]:
            outcomes[_most_common(values[going], right[row][going])] += 1
    pairs, same, settled_pairs, settled_same = totals.tolist()
    common = outcomes["right"], outcomes["wrong"], outcomes["tied"]
    return Agreement(pairs, same, settled_pairs, settled_same, distinct, *common)


def _pairs(counts: Ints) -> tuple[int, int]:
    """Of answers given so many times each: all pairs, and those of the same answer."""
    n = int(counts.sum())
    return n * (n - 1) // 2, int((counts * (counts - 1)).sum()) // 2


def _most_common(codes: Codes, right: Bools) -> str:
    values, counts = np.unique(codes, return_counts=True)
    if not len(values):
        return "wrong"
    top = values[counts == counts.max()]
    if len(top) > 1:
        return "tied"
    return "right" if right[codes == top[0]].all() else "wrong"
