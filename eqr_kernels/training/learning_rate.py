"""The learning rate along a run, a function of the training step alone."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, lr: float, warmup: int, total: int | None, min_ratio: float, decay_from: int | None = None
) -> float:
    """The rate of training step `step`, counted from 1.

    It rises linearly over `warmup` steps, stays at `lr` until step `decay_from` (None: the end of the warm-up), and
    falls by a cosine to `min_ratio * lr` at step `total`. Without a `total`, or at a `min_ratio` of 1, it never falls.
    """
    if step < warmup:
        return lr * step / warmup
    begin = warmup if decay_from is None else max(warmup, decay_from)
    if total is None or min_ratio >= 1 or step <= begin:
        return lr
    progress = min(1.0, (step - begin) / max(1, total - begin))
    return lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
