"""Intervals, tests and rank statistics, by SciPy but for the interval that it lacks; it is imported when it is used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.types import Doubles

Z95 = 1.959963984540054
"""Standard deviations of a normal distribution that its middle 95 % reach to either side."""


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 %; (0, 1) when nothing was counted.

    (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.)

    Raises:
        ValueError: not 0 <= successes <= total.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= total:
        raise ValueError(f"successes must be in 0..total, got {successes} of {total}")
    if not total:
        return 0.0, 1.0
    interval = binomtest(successes, total).proportion_ci(method="wilson")
    # At the ends the formula is exact in real numbers only.
    return float(interval.low) if successes else 0.0, float(interval.high) if successes < total else 1.0


def mcnemar(gained: int, lost: int) -> float:
    """Chance that of gained + lost fair coins the rarer side shows at most as often as it did here, doubled, at most 1.

    The exact test of McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12, 1947, with the binomial distribution in place of chi-squared.

    Raises:
        ValueError: a negative count.
    """
    from scipy.stats import binomtest

    if min(gained, lost) < 0:
        raise ValueError(f"gained and lost must be 0 or more, got {gained} and {lost}")
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def auroc(cost: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Share of the pairs of a right and a wrong trajectory in which the right one has the lower cost, ties at half.

    That is the area under the curve of hits over false alarms when "cost below a threshold" predicts "right"; here from
    the ranks (Mann and Whitney 1947). 0.5 says nothing, 1 tells right from wrong without fail.

    Args:
        cost: [n], such as residuals; infinities are ranked, and equal ones tie.
        right: bool [n].

    Returns:
        NaN where all or none are right: there is no pair.

    Raises:
        ValueError: the shapes differ, or a NaN.
    """
    from scipy.stats import rankdata

    costs, hits = _pair("cost and right", cost, right)
    wrong = hits == 0
    losers = int(wrong.sum())
    winners = len(costs) - losers
    if not losers or not winners:
        return math.nan
    above = rankdata(costs)[wrong].sum() - losers * (losers + 1) / 2
    return float(above / (losers * winners))


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, with equal values at their average rank.

    Args:
        x, y: [n].

    Returns:
        NaN where either is constant: it ranks nothing.

    Raises:
        ValueError: the shapes differ, or a NaN.
    """
    from scipy.stats import spearmanr

    a, b = _pair("x and y", x, y)
    if not len(a) or a.min() == a.max() or b.min() == b.max():
        return math.nan
    return float(spearmanr(a, b).statistic)


def _pair(names: str, first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"{names} must both be [n], got shapes {a.shape} and {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"{names} must hold no NaN, which has no rank; leave those out, or rank them last as inf")
    return a, b


@dataclass(frozen=True)
class Quartiles:
    """Of the finite ones of some values; NaN where there are none."""

    count: int
    low: float
    median: float
    high: float


def quartiles(values: npt.ArrayLike) -> Quartiles:
    """Quartiles of the finite values of an array of any shape."""
    v = np.asarray(values, np.float64)
    v = v[np.isfinite(v)]
    return Quartiles(len(v), *(np.quantile(v, (0.25, 0.5, 0.75)).tolist() if len(v) else [math.nan] * 3))


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


def tango_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """Score interval of a paired difference of proportions, (gained - lost) / total; at 95 %.

    It stays honest where few or no pairs differ: with none it is +- z^2 / (total + z^2). (Tango, "Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design", Statistics in Medicine 17,
    1998: the differences that his test does not reject.)

    Args:
        gained: pairs right in the second run only; lost: in the first only.
        total: all pairs.

    Raises:
        ValueError: counts are negative, or gained + lost > total, or there are no pairs.
    """
    if min(gained, lost) < 0 or gained + lost > total:
        raise ValueError(
            f"gained and lost must not be negative and add up to at most total, got {gained}, {lost}, {total}"
        )
    if not total:
        raise ValueError("total must be at least 1, got 0")
    estimate = (gained - lost) / total

    def accepted(delta: float) -> bool:
        return (gained - lost - total * delta) ** 2 <= Z95**2 * _variance(gained, lost, total, delta)

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
