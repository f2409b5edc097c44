"""Load on a server: as much as it takes, or what comes when it likes."""

from __future__ import annotations

import time
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.serving.servers import Served, Server
from benchmarks.serving.workload import EASY, HARD, Workload


@dataclass
class Log:
    """What became of requests, by their order: when each came, and when it was answered (NaN: not yet)."""

    puzzles: np.ndarray  # int64 [n]
    came: np.ndarray  # float64 [n], seconds
    answered: np.ndarray = field(init=False)
    steps: np.ndarray = field(init=False)
    wrong: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answered = np.full(len(self.puzzles), np.nan)
        self.steps = np.zeros(len(self.puzzles), np.int64)

    def take(self, index: int, served: Served, now: float, answers: Tensor) -> None:
        """answers: int64 [puzzles, S], what must come."""
        self.answered[index], self.steps[index] = now, served.steps
        if not torch.equal(served.preds, answers[self.puzzles[index]]):
            self.wrong.append(index)


def saturation(server: Server, workload: Workload, tokens: Tensor, answers: Tensor, count: int) -> dict[str, Any]:
    """Answers a second to requests that are all there from the start, until the last is answered.

    Whoever answers the short ones first would seem to be faster if only the first answers counted.
    """
    puzzles = workload.ask(count, stream=0)
    log = Log(puzzles, np.zeros(count))
    begun = time.perf_counter()

    def done(future: Any, index: int) -> None:
        log.take(index, future.result(), time.perf_counter() - begun, answers)

    futures = [server.submit(tokens[puzzle]) for puzzle in puzzles]
    for index, future in enumerate(futures):
        future.add_done_callback(partial(done, index=index))
    wait(futures)
    while np.isnan(log.answered).any():
        time.sleep(0.001)
    seconds = log.answered.max()
    assert not log.wrong, f"{len(log.wrong)} answers differ from those of solve"
    return {
        "requests_per_second": count / seconds,
        "steps_per_second": float(log.steps.sum() / seconds),
        "answered": count,
    }


def offered(
    server: Server, workload: Workload, tokens: Tensor, answers: Tensor, rate: float, seconds: float, deadline: float
) -> dict[str, Any]:
    """An open loop: requests come at `rate` a second whatever becomes of them; the first fifth is warm-up.

    A latency counts from when the request was due, however late it was sent. Those that wait for an answer when time is
    up count with what they have waited so far: their percentiles are lower bounds, and `unanswered` says how many.
    """
    arrivals = workload.arrivals(rate, seconds, stream=round(rate * 1000))
    log = Log(workload.ask(len(arrivals), stream=round(rate * 1000)), arrivals)
    begun = time.perf_counter()

    def done(future: Any, index: int) -> None:
        log.take(index, future.result(), time.perf_counter() - begun, answers)

    for index, due in enumerate(arrivals):
        if (wait := begun + due - time.perf_counter()) > 0:
            time.sleep(wait)
        server.submit(tokens[log.puzzles[index]]).add_done_callback(partial(done, index=index))
    while np.isnan(log.answered).any() and time.perf_counter() - begun < seconds + deadline:
        time.sleep(0.01)
    end = time.perf_counter() - begun
    assert not log.wrong, f"{len(log.wrong)} answers differ from those of solve"
    measured = log.came >= seconds / 5
    latency = np.where(np.isnan(log.answered), end, log.answered) - log.came
    kinds = {kind: np.array([workload.kind(int(p)) == kind for p in log.puzzles]) & measured for kind in (EASY, HARD)}
    within = measured & (latency <= deadline) & ~np.isnan(log.answered)
    return {
        "offered_per_second": rate,
        "requests": int(measured.sum()),
        "unanswered": int((measured & np.isnan(log.answered)).sum()),
        "goodput_per_second": float(within.sum() / (seconds * 4 / 5)),
        "steps_per_second": float(log.steps[log.answered >= seconds / 5].sum() / (end - seconds / 5)),
        "latency": {kind: percentiles(latency[chosen]) for kind, chosen in (*kinds.items(), ("all", measured))},
    }


def percentiles(latency: np.ndarray) -> dict[str, float]:
    """Seconds."""
    if not len(latency):
        return {}
    values = np.percentile(latency, [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}
