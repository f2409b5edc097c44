"""Two ways of answering the same puzzles: how many each one alone has right, and whether chance explains that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054


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

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the net change, see `tango_interval`."""
        return tango_interval(self.gained, self.lost, self.puzzles)


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


def tango_interval(gained: int, lost: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Score interval of a paired difference of proportions, (gained - lost) / total; at 95 % by default.

    It stays honest where few or no pairs differ: with none it is +- z^2 / (total + z^2). (Tango, "Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design", Statistics in Medicine 17,
    1998: the differences that his test does not reject.)

    Args:
        gained: pairs right in the second run only; lost: in the first only.
        total: all pairs.

    Raises:
        ValueError: counts are negative, or gained + lost > total, or there are no pairs.
    """
    _check(gained, lost, total)
    if not total:
        raise ValueError("total must be at least 1, got 0")
    estimate = (gained - lost) / total

    def accepted(delta: float) -> bool:
        return (gained - lost - total * delta) ** 2 <= z * z * _variance(gained, lost, total, delta)

    def end(outer: float) -> float:
        inner = estimate
        if accepted(outer):
            return outer
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if accepted(middle) else (inner, middle)
        return (inner + outer) / 2

    return end(-1.0), end(1.0)


def _variance(gained: int, lost: int, total: int, delta: float) -> float:
    """Of gained - lost where the true difference is `delta`, at the likeliest share of losses under it."""
    a = 2 * total
    b = -gained - lost + (2 * total - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    return max(0.0, total * (2 * share_lost + delta * (1 - delta)))


def _check(gained: int, lost: int, total: int) -> None:
    if min(gained, lost) < 0 or gained + lost > total:
        raise ValueError(
            f"gained and lost must not be negative and add up to at most total, got {gained}, {lost}, {total}"
        )
