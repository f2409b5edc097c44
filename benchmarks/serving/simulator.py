"""Recorded step counts replayed on any number of machines: what latency and cost would be.

A machine has W workers that take turns at its requests as the engine does: the least served first, one outer step at a
time; a lone request has all workers. Requests go to the machine that has the fewest of two drawn at random.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.serving.load import percentiles


@dataclass(frozen=True)
class Speed:
    """Seconds of an outer step: of a worker while all are busy, and of a request that has a machine for itself."""

    shared: float
    alone: float
    workers: int


@dataclass
class _Machine:
    waiting: list[tuple[int, int, int]] = field(default_factory=list)  # a heap of (quanta served, place, request)
    running: int = 0

    @property
    def requests(self) -> int:
        return len(self.waiting) + self.running


def simulate(
    came: np.ndarray,
    steps: Sequence[int],
    speed: Speed,
    machines: int,
    *,
    quantum: int = 4,
    fifo: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """The latency of each request, float64 [n] seconds.

    Args:
        came: float64 [n] seconds, rising. steps: the outer steps that each takes, at least 1.
        fifo: the oldest to its end in place of the least served.
    """
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, machines, (len(came), 2))
    all_machines = [_Machine() for _ in range(machines)]
    served, latency = np.zeros(len(came), np.int64), np.zeros(len(came))
    home = np.zeros(len(came), np.int64)
    events: list[tuple[float, int, int]] = []  # a heap of (end of an outer step, order, request)
    order = 0

    def begin(machine: _Machine, now: float) -> None:
        nonlocal order
        while machine.waiting and machine.running < speed.workers:
            _, _, request = heapq.heappop(machine.waiting)
            machine.running += 1
            order += 1
            seconds = speed.alone if machine.requests == 1 else speed.shared
            heapq.heappush(events, (now + seconds, order, request))

    def wait(machine: _Machine, request: int) -> None:
        rank = 0 if fifo else -(-int(served[request]) // quantum)
        heapq.heappush(machine.waiting, (rank, request, request))

    for comes in range(len(came) + 1):
        until = came[comes] if comes < len(came) else np.inf
        while events and events[0][0] <= until:
            now, _, request = heapq.heappop(events)
            machine = all_machines[home[request]]
            machine.running -= 1
            served[request] += 1
            if served[request] == steps[request]:
                latency[request] = now - came[request]
            else:
                wait(machine, request)
            begin(machine, now)
        if comes < len(came):
            a, b = choices[comes]
            home[comes] = a if all_machines[a].requests <= all_machines[b].requests else b
            wait(all_machines[home[comes]], comes)
            begin(all_machines[home[comes]], until)
    return latency


def scaling(
    requested: np.ndarray,
    step_counts: Sequence[int],
    speed: Speed,
    capacity: float,
    share: float,
    machines: Sequence[int],
    price: float,
    requests: int,
    seed: int,
) -> list[dict[str, float]]:
    """Latency and cost of fleets, each offered `share` of its capacity.

    Args:
        asked: int64 [m], puzzles in the order in which they are asked for; they repeat. step_counts: of each puzzle.
        capacity: requests a second of one machine. price: of a machine for an hour.
        requests: of each fleet at least; a fleet has at least 40 a machine.
    """
    rows = []
    for count in machines:
        n = max(requests, 40 * count)
        rate = share * capacity * count
        came = np.cumsum(np.random.default_rng([seed, count]).exponential(1 / rate, n))
        steps = [step_counts[requested[i % len(requested)]] for i in range(n)]
        latency = simulate(came, steps, speed, count, seed=seed)
        rows.append(
            {
                "machines": count,
                "offered_per_second": rate,
                "price_per_1000": price * count / 3600 / rate * 1000,
                **percentiles(latency[n // 5 :]),
            }
        )
    return rows
