"""One measured quantity with its noise, the rows that hold some, and the runs that hold rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Any

NORMAL = NormalDist()
SHARE, RATIO, TIME, AMOUNT = "share", "ratio", "time", "amount"
"""Of a peak measured in the same run; to a peer in the same run; absolute; bytes or outer steps."""
MOST_ROUNDS = 16
"""Calls that follow each other directly share the machine's phase: more of them are no better known than so many."""


@dataclass(frozen=True)
class Measure:
    """A positive quantity, the median of `rounds` rounds.

    Attributes:
        deviation: the standard deviation of a round's natural logarithm; None where the file does not tell, 0 where
            the quantity is exact.
    """

    name: str
    kind: str  # SHARE, RATIO, TIME or AMOUNT
    value: float
    deviation: float | None = None
    rounds: int = 1

    @property
    def relative(self) -> bool:
        """Whether it was measured against something else in the same run, so that a slow phase cancels."""
        return self.kind in (SHARE, RATIO)

    @property
    def cost(self) -> float:
        """Logarithm of what it costs: it rises when things get slower or more."""
        return -math.log(self.value) if self.relative else math.log(self.value)

    def variance(self, floor: float) -> float:
        """Of the logarithm of the median of the rounds; the deviation of a round counts as `floor` at least.

        That of the median of n normal values is near pi / (2 n + pi - 2) of one: exact for n = 1, 0.449 for n = 3 (by
        this 0.440), and pi / (2 n) for many (Kendall and Stuart, The Advanced Theory of Statistics, volume 1, 14).
        """
        if self.deviation == 0:
            return 0.0
        return max(self.deviation or 0.0, floor) ** 2 * math.pi / (2 * min(self.rounds, MOST_ROUNDS) + math.pi - 2)


@cache
def expected_range(rounds: int, share: float) -> float:
    """Mean distance of the quantiles `share` and 1 - `share` of that many standard normal values.

    Quantiles are `statistics.quantiles(method="inclusive")`. Means of order statistics by Blom's formula (Statistical
    Estimates and Transformed Beta Variables, 1958): with few rounds the range is too narrow by up to two fifths.
    """
    means = [NORMAL.inv_cdf((i + 1 - 0.375) / (rounds + 0.25)) for i in range(rounds)]
    at = (1 - share) * (rounds - 1)
    low = min(int(at), rounds - 2)
    return 2 * (means[low] + (at - low) * (means[low + 1] - means[low]))


def of_quantiles(name: str, kind: str, value: float, low: float, high: float, rounds: int, share: float) -> Measure:
    """A measure from its median, and its quantiles `share` and 1 - `share`, over the rounds."""
    rounds = max(2, rounds)
    # The quantiles of a reported quantity are of either order: a share's lowest is a time's highest.
    low, high = sorted((max(low, 1e-300), max(high, 1e-300)))
    return Measure(name, kind, value, math.log(high / low) / expected_range(rounds, share), rounds)


@dataclass(frozen=True)
class Row:
    """What one contender of one benchmark did.

    Attributes:
        measures: in the order of the file.
        peer: not of this package, and measured for comparison only.
        context: sizes and options; two rows are compared where these are equal.
        baseline: the peer that ratios are stated against.
    """

    name: str
    measures: Mapping[str, Measure]
    peer: bool = False
    context: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""

    def of(self, *kinds: str) -> list[Measure]:
        """Measures of these kinds, kind by kind; a ratio to the baseline before the others."""
        baseline = f"times_as_fast_as {self.baseline}"
        ordered = sorted(self.measures.values(), key=lambda m: m.name != baseline)
        return [m for kind in kinds for m in ordered if m.kind == kind]


@dataclass(frozen=True)
class Run:
    """One results file.

    Attributes:
        about: machine, versions and commit, by name; what is not known is left out.
        notes: anything that makes its numbers doubtful.
    """

    file: str
    kind: str  # "benchmark" or "curve"
    info: Mapping[str, Any]
    rows: Mapping[str, Row]
    notes: tuple[str, ...] = ()
