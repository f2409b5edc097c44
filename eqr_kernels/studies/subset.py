"""A fixed part of a set of puzzles that is like the whole, for what is too dear to run on all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.scoring import rating_bands
from eqr_kernels.studies.types import Ints

SUBSET_SEED = 20260605
"""Fixed for good, so that every model and every run with a seed of its own is measured on the same puzzles."""


def stratified_subset(
    inputs: npt.ArrayLike, source: Sequence[str] | npt.NDArray[np.str_], rating: npt.ArrayLike, n: int
) -> Ints:
    """n puzzles with the mix of sources and rating bands of the whole: their rows, rising, int64 [n].

    Sources get their shares of n, and within a source the bands of `RATING_BANDS` get theirs of its seats: rounded
    down, and what is left over goes to the largest remainders, ties to what is first by name. Within a band of a source
    those with the least SHA-256 of `SUBSET_SEED` and their tokens are taken: the choice depends on no model, seed,
    order of rows or library version.

    Args:
        inputs: tokens, integers 0..255 [N, S], as published: before clues are revealed.
        source: [N]. rating: numbers [N].
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
    strata: dict[str, dict[str, list[int]]] = {}
    for row, (name, band) in enumerate(zip(names.tolist(), rating_bands(rating), strict=True)):
        strata.setdefault(name, {}).setdefault(band, []).append(row)
    salt = SUBSET_SEED.to_bytes(8, "little")
    keys = [hashlib.sha256(salt + row.tobytes()).digest() for row in tokens.astype(np.uint8)]
    chosen: list[int] = []
    sources = _shares(n, {name: sum(map(len, bands.values())) for name, bands in strata.items()})
    for name, bands in strata.items():
        seats = _shares(sources[name], {band: len(rows) for band, rows in bands.items()})
        for band, rows in bands.items():
            chosen += sorted(rows, key=lambda row: (keys[row], row))[: seats[band]]
    return np.array(sorted(chosen), np.int64)


def _shares(n: int, sizes: dict[str, int]) -> dict[str, int]:
    """n in proportion to the sizes, by the method of the largest remainder; in whole numbers, so that ties are ties."""
    total = sum(sizes.values())
    seats = {name: n * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(n * sizes[name] % total), name))
    for name in by_remainder[: n - sum(seats.values())]:
        seats[name] += 1
    return seats


def digest(inputs: npt.ArrayLike, labels: npt.ArrayLike) -> str:
    """SHA-256 of puzzles and answers, integers 0..255 [N, S] twice, in their order: whether two runs had the same."""
    parts = [np.asarray(part).astype(np.uint8).tobytes() for part in (inputs, labels)]
    return hashlib.sha256(b"".join(parts)).hexdigest()
