"""Where a curve of accuracy against cost bends, and what to choose on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pareto(cost: npt.ArrayLike, accuracy: npt.ArrayLike) -> list[int]:
    """The points that no other beats: none is as accurate for less, or more accurate for as much. Rising in both.

    Args:
        cost, accuracy: [n]; a point with a NaN is never on the front.

    Raises:
        ValueError: the shapes differ.
    """
    price, right = np.asarray(cost, np.float64), np.asarray(accuracy, np.float64)
    if price.ndim != 1 or price.shape != right.shape:
        raise ValueError(f"cost and accuracy must both be [n], got shapes {price.shape} and {right.shape}")
    front: list[int] = []
    best = -math.inf
    for i in np.lexsort((-right, price)).tolist():
        if right[i] > best and not math.isnan(price[i]):
            front.append(i)
            best = right[i]
    return front


def knee(cost: Sequence[float], accuracy: Sequence[float]) -> int | None:
    """Where the next factor of cost begins to buy less: the place in a front that lies farthest above its chord.

    Both axes are scaled to 0..1, the cost by its logarithm (Satopaa et al., "Finding a 'Kneedle' in a Haystack", 2011,
    for a concave curve). None where nothing lies above the chord: with fewer than three points, or a curve that never
    bends that way.

    Args:
        cost, accuracy: [n], rising, cost positive.
    """
    if len(cost) < 3:
        return None
    x, y = np.log(np.asarray(cost, np.float64)), np.asarray(accuracy, np.float64)
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    place = int(above.argmax())
    return place if above[place] > 1e-9 else None


def cheapest_within(front: Sequence[int], accuracy: Sequence[float], points: float) -> int:
    """The first point of a front whose accuracy is within so many percentage points of the best."""
    best = accuracy[front[-1]]
    return next(i for i in front if accuracy[i] >= best - points / 100 - 1e-12)


def recommend(
    cost: Sequence[float], accuracy: Sequence[float], *, target: float | None = None, budget: float | None = None
) -> int | None:
    """The cheapest point that reaches the target, of those within the budget; without a target the most accurate.

    Args:
        cost, accuracy: [n]. target: a share of 0..1. budget: the most that the cost may be.

    Returns:
        None where no point will do.

    Raises:
        ValueError: neither is given, or one is out of range.
    """
    if target is None and budget is None:
        raise ValueError("name a target, a budget, or both")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"target must be a share above 0 and up to 1, as in 0.95, got {target}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be positive and finite, got {budget}")
    fits = [i for i in pareto(cost, accuracy) if budget is None or cost[i] <= budget]
    if target is None:
        return fits[-1] if fits else None
    return next((i for i in fits if accuracy[i] >= target), None)
