"""Comparisons of two runs on the same puzzles, ready for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.statistics import Z95, pair, wilson_interval
from eqr_kernels.studies.types import Bools


def counted(successes: int, total: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; the share is None when nothing was counted."""
    share = successes / total if total else None
    return {"count": successes, "total": total, "share": share, "wilson95": list(wilson_interval(successes, total))}


def compare_answers(before: npt.ArrayLike, after: npt.ArrayLike) -> dict[str, Any]:
    """What a second run gains and loses: bool [N] twice, right or not -> counts, difference, its interval, p-value.

    Raises:
        ValueError: the shapes differ, or are not [N >= 1].
    """
    paired = pair(before, after)
    return {
        "both_right": int((np.asarray(before, bool) & np.asarray(after, bool)).sum()),
        "gained": paired.gained,
        "lost": paired.lost,
        "difference": paired.net,
        "tango95": list(paired.interval),
        "mcnemar_p": paired.p,
    }


def clustered_difference(before: Bools, after: Bools, among: Bools) -> dict[str, Any] | None:
    """By how much a second run has more right, among some of B trajectories of each of N puzzles: bool [N, B] thrice.

    The interval is that of a ratio estimate over puzzles (Cochran, Sampling Techniques, 6.4): the trajectories of one
    puzzle are alike, and count as one.

    Returns:
        "difference" (a share of the trajectories), "interval95", "trajectories" and "puzzles" that were counted; None
        where there is none, or one puzzle alone.
    """
    puzzles = np.flatnonzero(among.any(1))
    if len(puzzles) < 2:
        return None
    size = among[puzzles].sum(1)
    gain = ((after.astype(int) - before.astype(int)) * among)[puzzles].sum(1)
    difference = gain.sum() / size.sum()
    spread = np.sqrt(len(puzzles) / (len(puzzles) - 1) * ((gain - difference * size) ** 2).sum()) / size.sum()
    reach = Z95 * spread
    return {
        "difference": float(difference),
        "interval95": [float(difference - reach), float(difference + reach)],
        "trajectories": int(size.sum()),
        "puzzles": len(puzzles),
    }
