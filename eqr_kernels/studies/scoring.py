"""Which answers are right, how many are, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.types import Bools, Floats

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


def token_accuracy(preds: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """Share of the labelled tokens that are right: integers [N, B, S] and [N, S] -> float32 [N, B].

    Givens count too, as they are labelled. NaN in the rows of puzzles without any label.

    Raises:
        ValueError: the shapes do not fit.
    """
    predicted, wanted = np.asarray(preds), np.asarray(labels)
    if predicted.ndim != 3 or wanted.shape != (predicted.shape[0], predicted.shape[2]):
        raise ValueError(f"preds must be [N, B, S] and labels [N, S], got shapes {predicted.shape} and {wanted.shape}")
    labelled = wanted != 0
    right = ((predicted == wanted[:, None]) & labelled[:, None]).sum(2)
    count = labelled.sum(1)[:, None]
    shares = np.divide(right, count, out=np.full(right.shape, np.nan), where=count > 0)
    return shares.astype(np.float32)


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

    def as_json(self) -> dict[str, Any]:
        """Counts, share and interval by name."""
        return {"correct": self.correct, "total": self.total, "share": self.share, "wilson95": list(self.interval)}


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
