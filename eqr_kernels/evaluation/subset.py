"""A fixed part of a set of puzzles that is like the whole, for what is too dear to run on all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eqr_kernels.evaluation.scoring import rating_bands
from eqr_kernels.evaluation.types import Ints

SUBSET_SEED = 20260605
"""Fixed for good, so that every model and every run with a seed of its own is measured on the same puzzles."""


def stratified_subset(
    inputs: npt.ArrayLike, source: Sequence[str] | npt.NDArray[np.str_], rating: npt.ArrayLike, n: int
) -> Ints:
    """n puzzles with the mix of sources and rating bands of the whole: their rows, rising, int64 [n].

    Each stratum (a source and a band of `RATING_BANDS`) gives its share of n rounded down; the seats left over go to
    the largest remainders, ties to the stratum that is first by name. Within a stratum those with the least SHA-256 of
    `SUBSET_SEED` and their tokens are taken: the choice depends on no model, seed, order of rows or library version.

    Args:
        inputs: tokens, integers 0..255 [N, S], as published: before clues are revealed.
        source: [N]. rating: integers [N].
        n: 1 to N.

    Raises:
        ValueError: the shapes differ, or n is out of range.
    """
    tokens, names = np.asarray(inputs), np.asarray(source)
    total = len(tokens)
    if tokens.ndim != 2 or names.shape != (total,) or np.shape(rating) != (total,):
        raise ValueError(
            f"inputs must be [N, S], source and rating [N], got shapes {tokens.shape}, {names.shape} and "
            f"{np.shape(rating)}"
        )
    if not 1 <= n <= total:
        raise ValueError(f"a subset must have 1 to all {total} of the puzzles, got {n}")
    strata: dict[tuple[str, str], list[int]] = {}
    for row, stratum in enumerate(zip(names.tolist(), rating_bands(rating), strict=True)):
        strata.setdefault(stratum, []).append(row)
    # In whole numbers, so that ties are ties.
    seats = {stratum: n * len(strata[stratum]) // total for stratum in sorted(strata)}
    by_remainder = sorted(seats, key=lambda stratum: (-(n * len(strata[stratum]) % total), stratum))
    for stratum in by_remainder[: n - sum(seats.values())]:
        seats[stratum] += 1
    salt = SUBSET_SEED.to_bytes(8, "little")
    keys = [hashlib.sha256(salt + row.tobytes()).digest() for row in tokens.astype(np.uint8)]
    chosen = [sorted(rows, key=lambda row: (keys[row], row))[: seats[stratum]] for stratum, rows in strata.items()]
    return np.sort(np.concatenate(chosen).astype(np.int64))


def digest(inputs: npt.ArrayLike, labels: npt.ArrayLike) -> str:
    """SHA-256 of puzzles and answers, integers 0..255 [N, S] twice, in their order: whether two runs had the same."""
    parts = [np.asarray(part).astype(np.uint8).tobytes() for part in (inputs, labels)]
    return hashlib.sha256(b"".join(parts)).hexdigest()
