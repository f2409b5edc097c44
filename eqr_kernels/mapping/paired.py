"""Two runs on the same puzzles: is one better, and by how much at most?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.evaluation import wilson_interval

_Z95 = 1.959963984540054


def counted(successes: int, total: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval, ready for JSON; the share is None when nothing was counted."""
    share = successes / total if total else None
    return {"count": successes, "total": total, "share": share, "wilson95": list(wilson_interval(successes, total))}


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p-value that gains and losses are equally likely: a binomial test of the pairs that differ.

    (McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12, 1947.)
    """
    _check(gained, lost, gained + lost)
    differ, least = gained + lost, min(gained, lost)
    tail = sum(math.comb(differ, k) for k in range(least + 1))
    return float(min(1.0, 2 * tail / 2**differ))


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


def compare_answers(before: npt.ArrayLike, after: npt.ArrayLike) -> dict[str, Any]:
    """What a second run gains and loses: bool [N] twice, right or not -> counts, difference, its interval, p-value."""
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"before and after must both be [N >= 1], got shapes {first.shape} and {second.shape}")
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return {
        "both_right": int((first & second).sum()),
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / len(first),
        "tango95": list(tango_interval(gained, lost, len(first))),
        "mcnemar_p": mcnemar_p(gained, lost),
    }


def _check(gained: int, lost: int, total: int) -> None:
    if min(gained, lost) < 0 or gained + lost > total:
        raise ValueError(
            f"gained and lost must not be negative and add up to at most total, got {gained}, {lost}, {total}"
        )
