"""Whether a small residual means a right answer: rank statistics, with no assumption on how residuals are spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def _ranks(values: Doubles) -> Doubles:
    """Ranks from 1, those of equal values averaged: [n] -> float64 [n]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Doubles = (last - (counts - 1) / 2)[place.reshape(-1)]
    return ranks


def _pair(names: str, first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"{names} must both be [n], got shapes {a.shape} and {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"{names} must hold no NaN, which has no rank; leave those out, or rank them last as inf")
    return a, b


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
    costs, hits = _pair("cost and right", cost, right)
    wrong = hits == 0
    losers = int(wrong.sum())
    winners = len(costs) - losers
    if not losers or not winners:
        return math.nan
    above = _ranks(costs)[wrong].sum() - losers * (losers + 1) / 2
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
    a, b = (_ranks(values) for values in _pair("x and y", x, y))
    if not len(a) or a.min() == a.max() or b.min() == b.max():
        return math.nan
    a, b = a - (len(a) + 1) / 2, b - (len(b) + 1) / 2
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@dataclass(frozen=True)
class Coupling:
    """How far residual and score tell right from wrong among the trajectories at one depth.

    Attributes:
        depth: outer steps.
        trajectories: how many were compared; right: those of them whose answer is right in every labelled token.
        diverged: those that are ranked last, whatever their residual and score.
        residual_auroc, score_auroc: see `auroc`; NaN where all or none are right.
        residual_spearman, score_spearman: rank correlation with the share of a trajectory's labelled tokens (givens
            included) that are right; -1 where less residual always means more of them. NaN where either is constant.
    """

    depth: int
    trajectories: int
    right: int
    diverged: int
    residual_auroc: float
    residual_spearman: float
    score_auroc: float
    score_spearman: float


def couple(
    depth: int,
    exact: npt.ArrayLike,
    accuracy: npt.ArrayLike,
    residual: npt.ArrayLike,
    score: npt.ArrayLike,
    diverged: npt.ArrayLike,
) -> Coupling:
    """The coupling over all trajectories of all puzzles at one depth.

    Args:
        exact: bool [N, B], right in every labelled token.
        accuracy: float32 [N, B], share of the labelled tokens that are right; NaN in rows of puzzles without any label,
            which are left out.
        residual, score: float32 [N, B]; NaN ranks last.
        diverged: bool [N, B], ranks last.
    """
    share = np.asarray(accuracy, np.float64).reshape(-1)
    counted = ~np.isnan(share)
    lost = np.asarray(diverged, bool).reshape(-1)[counted]
    right = np.asarray(exact, bool).reshape(-1)[counted]
    share = share[counted]
    told = []
    for values in (residual, score):
        cost = np.asarray(values, np.float64).reshape(-1)[counted]
        cost = np.where(lost | np.isnan(cost), np.inf, cost)
        told += [auroc(cost, right), spearman(cost, share)]
    return Coupling(depth, len(right), int(right.sum()), int(lost.sum()), *told)
