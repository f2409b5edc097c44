"""Comparisons of two runs on the same puzzles, ready for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies.statistics import pair, wilson_interval


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
