"""Two ways of answering the same puzzles: how many each one alone has right, and whether chance explains that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Paired:
    """Puzzles that a change gained and lost.

    Attributes:
        puzzles: how many were compared.
        gained, lost: right only after the change, and right only before it.
    """

    puzzles: int
    gained: int
    lost: int

    @property
    def net(self) -> float:
        """Change of the accuracy, as a share; NaN when there are no puzzles."""
        return (self.gained - self.lost) / self.puzzles if self.puzzles else math.nan

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p, see `mcnemar`."""
        return mcnemar(self.gained, self.lost)


def pair(before: npt.ArrayLike, after: npt.ArrayLike) -> Paired:
    """Compares two answers to each puzzle, right or not: bool [N] twice.

    Raises:
        ValueError: the shapes differ, or are not [N].
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"before and after must both be [N], got shapes {first.shape} and {second.shape}")
    return Paired(len(first), int((second & ~first).sum()), int((first & ~second).sum()))


def mcnemar(gained: int, lost: int) -> float:
    """Chance that of gained + lost fair coins the rarer side shows at most as often as it did here, doubled, at most 1.

    The exact test of McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12, 1947, with the binomial distribution in place of chi-squared.

    Raises:
        ValueError: a negative count.
    """
    if min(gained, lost) < 0:
        raise ValueError(f"gained and lost must be 0 or more, got {gained} and {lost}")
    n, ways, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    # Whole numbers up to here: a quotient of two of any size is rounded once.
    return min(1.0, 2 * tail / (1 << n)) if n else 1.0
