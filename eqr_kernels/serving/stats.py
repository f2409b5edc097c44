"""What an engine says of its load."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.serving.runner import RunnerStats

WINDOW = 5.0
"""Seconds over which rates are taken, at least; longer where nobody asked meanwhile."""


@dataclass(frozen=True)
class EngineStats:
    """The load of an engine. submitted = completed + cancelled + failed + requests + queued.

    Attributes:
        in_flight: trajectories that have a state now.
        queued: requests of which something has not begun. requests: the others that have not ended.
        submitted, completed, cancelled, failed: counts of requests since the start; one that passed its deadline has
            failed.
        steps: outer steps spent since the start, of all trajectories.
        steps_per_second: over the last seconds.
        utilisation: 0 to 1, the share of its workers' time that was computing, over the last seconds.
        steps_histogram: finished trajectories of completed requests by their outer steps: each bin's upper bound, a
            power of two, to their number.
    """

    in_flight: int
    queued: int
    requests: int
    submitted: int
    completed: int
    cancelled: int
    failed: int
    steps: int
    steps_per_second: float
    utilisation: float
    steps_histogram: dict[int, int]


class _Sample(NamedTuple):
    at: float
    steps: int
    busy: float


class Meter:
    """Rates of counts that only grow."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._samples: deque[_Sample] = deque([_Sample(time.monotonic(), 0, 0.0)])

    def rates(self, runners: Sequence[RunnerStats]) -> tuple[float, float]:
        """Steps a second, and the share of time that the workers were busy, since `WINDOW` ago."""
        steps, busy = sum(r.steps for r in runners), sum(r.busy_seconds for r in runners)
        workers = sum(r.workers for r in runners)
        with self._lock:
            now = _Sample(time.monotonic(), steps, busy)
            while len(self._samples) > 1 and self._samples[1].at <= now.at - WINDOW:
                self._samples.popleft()
            first = self._samples[0]
            if now.at - self._samples[-1].at >= WINDOW / 20:
                self._samples.append(now)
        seconds = max(now.at - first.at, 1e-9)
        used = (now.busy - first.busy) / (seconds * workers) if workers else 0.0
        return max(now.steps - first.steps, 0) / seconds, min(max(used, 0.0), 1.0)
