"""What /metrics tells, for Prometheus."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from eqr_kernels.serving import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RATE_OVER_SECONDS = 30.0
_LONGEST_WAIT = 120


class _EngineCollector(Collector):
    """The engine's own figures, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for name, text, value in (
            ("in_flight", "Trajectories with a state.", stats.in_flight),
            ("queued", "Puzzles that wait to begin.", stats.queued),
            ("requests", "Puzzles that have begun and not ended.", stats.requests),
            ("steps_per_second", "Outer steps a second, lately.", stats.steps_per_second),
            ("utilisation", "Share of the workers' time that is spent computing, lately.", stats.utilisation),
        ):
            yield GaugeMetricFamily(f"eqr_engine_{name}", text, value)
        for name, text, value in (
            ("submitted", "Puzzles that the engine took.", stats.submitted),
            ("completed", "Puzzles that it answered.", stats.completed),
            ("cancelled", "Puzzles given up before their answer.", stats.cancelled),
            ("failed", "Puzzles that ended in an error or at their deadline.", stats.failed),
            ("steps", "Outer steps spent.", stats.steps),
        ):
            yield CounterMetricFamily(f"eqr_engine_{name}", text, value)
        total, buckets = 0, []
        for bound, count in sorted(stats.steps_histogram.items()):
            total += count
            buckets.append((str(float(bound)), float(total)))
        histogram = HistogramMetricFamily("eqr_trajectory_steps", "Outer steps of the trajectories that have ended.")
        histogram.add_metric([], [*buckets, ("+Inf", float(total))], sum_value=None)
        yield histogram


class Metrics:
    """Counters of one app, in a registry of its own: several apps may be in a process."""

    def __init__(self, engine: Engine, build: dict[str, str]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("eqr_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "eqr_request_seconds",
            "From the request to the end of its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.active = Gauge("eqr_requests_active", "Requests that are being answered.", registry=registry)
        self.rejected = Counter("eqr_rejected", "Requests refused, by reason.", ["reason"], registry=registry)
        self.puzzles = Counter("eqr_puzzles", "Puzzles by what became of them.", ["outcome"], registry=registry)
        Gauge("eqr_build_info", "1, with what runs as labels.", list(build), registry=registry).labels(**build).set(1)
        registry.register(_EngineCollector(engine))
        ProcessCollector(registry=registry)


class Throughput:
    """Puzzles answered a second, measured over the last half minute."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=10_000)
        self._lock = threading.Lock()

    def ended(self) -> None:
        with self._lock:
            self._ends.append(time.monotonic())

    def seconds_for(self, puzzles: int) -> int:
        """How long so many take, whole seconds from 1 to 120; 5 where nothing was answered lately."""
        now = time.monotonic()
        with self._lock:
            while self._ends and self._ends[0] < now - _RATE_OVER_SECONDS:
                self._ends.popleft()
            if not self._ends:
                return 5
            rate = len(self._ends) / max(1.0, now - self._ends[0])
        return min(_LONGEST_WAIT, max(1, math.ceil(puzzles / rate)))
