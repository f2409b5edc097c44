"""Recordings by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from eqr_kernels.studies.recording import Recording
from eqr_kernels.trajectory import Status


def made(
    correct: Any,
    residual: Any,
    *,
    depths: tuple[int, ...] | None = None,
    accuracy: Any = None,
    answer: Any = None,
    score: Any = None,
    q_halt: Any = None,
    diverged: Any = None,
    halt: str = "none",
    **how: Any,
) -> Recording:
    """From lists [N][B][K], but the residual [N][B][D], and diverged [N][B], the steps; how: views, turn_every."""
    right, r = np.array(correct, bool), np.array(residual, np.float32)
    depths = depths or tuple(range(1, r.shape[2] + 1))
    gone = np.full(right.shape[:2], r.shape[2] + 1) if diverged is None else np.array(diverged)
    lost = np.array(depths) >= gone[..., None]

    def given(values: Any, otherwise: Any, dtype: Any) -> np.ndarray:
        return np.array(otherwise if values is None else values, dtype)

    return Recording(
        depths,
        right,
        given(accuracy, right, np.float32),
        given(answer, right, np.uint64),
        given(score, r[..., [depth - 1 for depth in depths]], np.float32),
        given(q_halt, np.full(right.shape, -1), np.float32),
        np.where(lost, gone[..., None], np.array(depths)),
        np.where(lost, int(Status.DIVERGED), int(Status.MAX_DEPTH)).astype(np.int8),
        r,
        halt,
        "made",
        "",
        **how,
    )
