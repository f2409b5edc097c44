"""Which answers are right and which are the same, how many are right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.statistics import wilson_interval
from eqr_kernels.studies.types import Bools, Codes, Floats

_CODE_SEED = 20260605
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
    """Whether every labelled token is right: integers [N, S] or [N, B, S], and [N, S] -> bool [N] or [N, B].

    A row without any label is never right.

    Raises:
        ValueError: the shapes do not fit.
    """
    right, labelled = _judged(preds, labels)
    return np.asarray((right | ~labelled).all(-1) & labelled.any(-1))


def token_accuracy(preds: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """Share of the labelled tokens that are right: integers [N, S] or [N, B, S], and [N, S] -> float32 [N] or [N, B].

    Givens count too, as they are labelled. NaN in the rows of puzzles without any label.

    Raises:
        ValueError: the shapes do not fit.
    """
    right, labelled = _judged(preds, labels)
    hits, count = (right & labelled).sum(-1), labelled.sum(-1)
    shares = np.divide(hits, count, out=np.full(hits.shape, np.nan), where=count > 0)
    return shares.astype(np.float32)


def _judged(preds: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Bools, Bools]:
    """Which tokens are right, and which are labelled (of a shape that broadcasts)."""
    predicted, wanted = np.asarray(preds), np.asarray(labels)
    if wanted.ndim != 2 or predicted.ndim not in (2, 3) or (len(predicted), predicted.shape[-1]) != wanted.shape:
        raise ValueError(
            f"preds must be [N, S] or [N, B, S] and labels [N, S], got shapes {predicted.shape} and {wanted.shape}"
        )
    if predicted.ndim == 3:
        wanted = wanted[:, None]
    return predicted == wanted, wanted != 0


def answer_codes(preds: npt.ArrayLike) -> Codes:
    """A number for each answer: integers [..., S] -> uint64 [...]; equal for equal answers, and else for all but 2^-60.

    A sum of the tokens with fixed odd weights, modulo 2^64.
    """
    tokens = np.asarray(preds)
    weights = np.random.default_rng(_CODE_SEED).integers(0, 1 << 63, tokens.shape[-1], np.uint64) * np.uint64(2)
    codes: Codes = (tokens.astype(np.uint64) * (weights + np.uint64(1))).sum(-1, dtype=np.uint64)
    return codes


@dataclass(frozen=True)
class Accuracy:
    """How many of `total` puzzles are right."""

    correct: int
    total: int

    @classmethod
    def of(cls, correct: Bools) -> Accuracy:
        """Of puzzles [N], bool: which are right."""
        return cls(int(correct.sum()), len(correct))

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
    return {name: [Accuracy.of(right) for right in part.T] for name, part in parts.items()}


def rating_bands(rating: npt.ArrayLike) -> list[str]:
    """The name in `RATING_BANDS` of each rating, numbers [N]; a decimal one counts by its whole part."""
    return [
        next(name for name, (low, high) in RATING_BANDS.items() if low <= math.floor(value) <= high)
        for value in np.asarray(rating).tolist()
    ]
