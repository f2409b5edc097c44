"""What an outer step costs on this machine: time alone and in company, memory, and energy where the machine tells."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies import meters
from eqr_kernels.studies.types import Doubles
from eqr_kernels.views import int64


@dataclass(frozen=True)
class Price:
    """What an hour of the whole machine (of the GPU, where the model is on one) costs."""

    per_hour: float
    currency: str = "USD"

    def __post_init__(self) -> None:
        if not 0 < self.per_hour < math.inf:
            raise ValueError(f"a price must be positive and finite, in money an hour, got {self.per_hour}")


@dataclass(frozen=True)
class Latency:
    """One query of so many trajectories: overhead_ms + ms_per_nfe * outer steps, from medians of two depths."""

    breadth: int
    overhead_ms: float
    ms_per_nfe: float


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a solve above what the process (the GPU's allocator) held before."""

    depth: int
    breadth: int
    peak_bytes: int


@dataclass(frozen=True)
class Energy:
    """Joules of an outer step at saturation, all that the meter sees included; source: "NVML" or "RAPL"."""

    joules_per_nfe: float
    watts: float
    source: str


@dataclass(frozen=True)
class UnitCosts:
    """What `map_points` multiplies outer steps with.

    Attributes:
        latency: of each breadth, rising.
        trajectories, ms_per_nfe: at saturation: how many were in a call, and wall time of an outer step of one.
        units: processors that a second of it occupies: torch's threads, or 1 GPU.
        unit: "core" or "GPU".
        memory: as measured; empty where the system does not tell.
        energy: None where nothing measures it.
        side_by_side: a query's trajectories go at once, so that it takes as long as the longest; on a CPU the threads
            share all that is left, and it takes what their steps add up to.
    """

    latency: tuple[Latency, ...]
    trajectories: int
    ms_per_nfe: float
    units: int
    unit: str
    memory: tuple[Memory, ...]
    energy: Energy | None
    side_by_side: bool = False

    def query_ms(
        self,
        breadth: int,
        nfe: npt.NDArray[np.integer],
        longest: npt.NDArray[np.integer],
        one_by_one: npt.NDArray[np.integer] | None = None,
    ) -> Doubles:
        """Time of queries alone, from their outer steps and those of their longest trajectories: [N] -> float64 [N].

        Args:
            one_by_one: [N], trajectories run one after the other; None: a query's trajectories go at once.
        """
        alone = self.latency_of(breadth if one_by_one is None else 1)
        if one_by_one is not None:
            return np.asarray(alone.overhead_ms * one_by_one + alone.ms_per_nfe * nfe)
        steps = np.asarray(breadth * longest if self.side_by_side else nfe, np.float64)
        return np.asarray(alone.overhead_ms + alone.ms_per_nfe * steps)

    def peak_bytes(self, depth: int, breadth: int) -> int | None:
        """Measured for exactly this depth and breadth; None where it was not."""
        sizes = ((m.depth, m.breadth, m.peak_bytes) for m in self.memory)
        return next((peak for d, b, peak in sizes if (d, b) == (depth, breadth)), None)

    def latency_of(self, breadth: int) -> Latency:
        """Of a breadth that was measured."""
        return next(x for x in self.latency if x.breadth == breadth)


def measure_costs(
    model: EquilibriumReasoner,
    inputs: npt.NDArray[np.integer],
    breadths: Sequence[int],
    *,
    depths: Sequence[int] = (16,),
    seconds: float = 0.25,
    rounds: int = 5,
    trajectories: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> UnitCosts:
    """Times solves without halting, the breadths in turns so that a slow phase of the machine meets them all.

    Args:
        inputs: tokens, integers [N, S], of puzzles to run; single queries take one after the other.
        breadths: to time single queries of.
        depths: to measure the peak memory at, with the least and the greatest breadth.
        seconds: that the longer of the two solves behind a median should take.
        rounds: behind a median.
        trajectories: at saturation; by default 64 a thread, or 16 a multiprocessor.
        progress: called with (measurements done, in all).
        options: further arguments of `solve` (turns, window, noise_scale, slots, backend, precision).
    """
    cuda = model.device.type == "cuda"
    if trajectories is None:
        per_unit = torch.cuda.get_device_properties(model.device).multi_processor_count if cuda else 0
        trajectories = 16 * per_unit if cuda else 64 * torch.get_num_threads()
    many = inputs[np.arange(trajectories) % len(inputs)]
    ids = torch.arange(trajectories, device="cpu")
    run: dict[str, Any] = dict(halt="none", **options)
    ran = model.solve(int64(inputs[:1]), depth=1, breadth=1, **run).backend

    def alone(breadth: int, depth: int, number: int = 0) -> float:
        row = number % len(inputs)
        return _seconds(model, inputs[row : row + 1], depth=depth, breadth=breadth, **run)

    def together(depth: int) -> float:
        return _seconds(model, many, depth=depth, breadth=1, ids=ids, **run)

    deeper = {b: _deep_enough(partial(alone, b), seconds) for b in breadths}
    full = _deep_enough(together, 4 * seconds)
    pairs: dict[int, list[tuple[float, float]]] = {b: [] for b in breadths}
    crowd: list[tuple[float, float]] = []
    done, of = 0, rounds * (len(breadths) + 1)
    for number in range(rounds):
        for b in breadths:
            alone(b, 1, number)  # or the first one would find the caches and the threads as the crowd left them
            pairs[b].append((alone(b, 1, number), alone(b, deeper[b], number)))
            done += 1
            if progress is not None:
                progress(done, of)
        crowd.append((together(1), together(full)))
        done += 1
        if progress is not None:
            progress(done, of)
    latency = []
    for b in breadths:
        short, long = (statistics.median(times) * 1e3 for times in zip(*pairs[b], strict=True))
        step = (long - short) / ((deeper[b] - 1) * b)
        latency.append(Latency(b, max(0.0, short - step * b), step))
    short, long = (statistics.median(times) * 1e3 for times in zip(*crowd, strict=True))
    joules = meters.joules(lambda: together(full), 2 * seconds, model.device)
    energy = None
    if joules is not None:
        spent = joules.calls * full * trajectories
        energy = Energy(joules.joules / spent, joules.joules / joules.seconds, joules.source)
    memory = []
    for depth in depths:
        for b in sorted({min(breadths), max(breadths)}):

            def solve(depth: int = depth, b: int = b) -> object:
                return model.solve(int64(inputs[:1]), depth=depth, breadth=b, **run)

            peak = meters.peak_bytes(solve, model.device)
            if peak is not None:
                memory.append(Memory(depth, b, peak))
    return UnitCosts(
        tuple(latency),
        trajectories,
        (long - short) / ((full - 1) * trajectories),
        1 if cuda else torch.get_num_threads(),
        "GPU" if cuda else "core",
        tuple(memory),
        energy,
        ran != "cpu",
    )


def _seconds(model: EquilibriumReasoner, inputs: npt.NDArray[np.integer], **options: Any) -> float:
    meters.synchronize(model.device)
    begun = time.perf_counter()
    model.solve(int64(inputs), **options)
    meters.synchronize(model.device)
    return time.perf_counter() - begun


def _deep_enough(run: Callable[[int], float], seconds: float, limit: int = 4096) -> int:
    """A depth whose solve takes about so long; what is run here also warms up."""
    run(2)
    short, long = run(1), run(5)
    # A hiccup in the short one must not make the long one endless.
    step = max((long - short) / 4, long / 50)
    return int(min(limit, max(5, 1 + seconds / step)))
