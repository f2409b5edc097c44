"""The map itself: what each policy answers, what it costs, and where that bends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eqr_kernels.studies.costs import Price, UnitCosts
from eqr_kernels.studies.front import cheapest_within, knee, pareto
from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import Policy, outcome
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.types import Bools, Ints

WITHIN_POINTS = 0.5


@dataclass(frozen=True)
class Point:
    """One policy over N puzzles.

    Attributes:
        policy: how it runs.
        accuracy: exact, of the selected answers.
        settled: share of the puzzles whose selected trajectory had halted; None for "fixed".
        nfe: outer steps a puzzle, the mean over puzzles, all trajectories together.
        latency_ms: p50, p95, p99 over the puzzles of a query alone, from its own outer steps and `UnitCosts`.
        throughput: puzzles a second at saturation.
        unit_seconds: core- or GPU-seconds of a puzzle at saturation.
        cost_per_1000: money for 1,000 puzzles at saturation; None without a price.
        joules: of a puzzle at saturation; None where nothing measures them.
    """

    policy: Policy
    accuracy: Accuracy
    settled: float | None
    nfe: float
    latency_ms: tuple[float, float, float]
    throughput: float
    unit_seconds: float
    cost_per_1000: float | None
    joules: float | None


def map_points(
    recording: Recording, policies: Iterable[Policy], costs: UnitCosts, price: Price | None = None
) -> list[Point]:
    """Each policy replayed on a recording, with what it costs.

    Raises:
        ValueError: a policy goes beyond the recording.
    """
    return [_point(recording, policy, costs, price) for policy in policies]


def _point(recording: Recording, policy: Policy, costs: UnitCosts, price: Price | None) -> Point:
    result = outcome(recording, policy)
    nfe = float(result.nfe.mean())
    queries = costs.query_ms(policy.breadth, result.nfe, result.longest, result.one_by_one)
    p50, p95, p99 = (float(q) for q in np.percentile(queries, (50, 95, 99)))
    seconds = nfe * costs.ms_per_nfe / 1e3
    return Point(
        policy,
        Accuracy.of(result.correct),
        None if policy.name == "fixed" else float(result.settled.mean()),
        nfe,
        (p50, p95, p99),
        1 / seconds,
        seconds * costs.units,
        None if price is None else 1e3 * seconds / 3600 * price.per_hour,
        None if costs.energy is None else nfe * costs.energy.joules_per_nfe,
    )


@dataclass(frozen=True)
class Bend:
    """Indices into the points.

    Attributes:
        front: none is as accurate for less, rising in cost and accuracy.
        best: the most accurate.
        cheapest_within: the cheapest within `within_points` percentage points of the best.
        knee: where the next factor of cost begins to buy less; None where the front does not bend.
    """

    front: tuple[int, ...]
    best: int
    cheapest_within: int
    knee: int | None
    within_points: float = WITHIN_POINTS


def bend(points: Sequence[Point]) -> Bend:
    """Where accuracy against the mean cost of a puzzle at saturation bends."""
    cost, right = [p.unit_seconds for p in points], [p.accuracy.share for p in points]
    front = pareto(cost, right)
    place = knee([cost[i] for i in front], [right[i] for i in front])
    within = cheapest_within(front, right, WITHIN_POINTS)
    return Bend(tuple(front), front[-1], within, None if place is None else front[place])


@dataclass(frozen=True)
class Saving:
    """What stopping at a tolerance saves against running every trajectory to the depth.

    Attributes:
        breadth: of both.
        full, exit: right answers. lost, gained: puzzles that only one of them answers right.
        nfe_full, nfe_exit: outer steps a puzzle. settled: share of the puzzles whose selected trajectory settled.
    """

    breadth: int
    full: Accuracy
    exit: Accuracy
    lost: int
    gained: int
    nfe_full: float
    nfe_exit: float
    settled: float

    @property
    def times(self) -> float:
        """How many times fewer outer steps."""
        return self.nfe_full / self.nfe_exit


def savings(
    recording: Recording, breadths: Sequence[int], *, tol: float, depth: int | None = None, select: str = "residual"
) -> list[Saving]:
    """At each breadth, residual exit against the fixed depth (by default the recording's)."""
    depth = recording.depth if depth is None else depth
    rows = []
    for b in breadths:
        full = outcome(recording, Policy("fixed", depth, b, select=select))
        early = outcome(recording, Policy("residual", depth, b, tol, select))
        rows.append(
            Saving(
                b,
                Accuracy.of(full.correct),
                Accuracy.of(early.correct),
                int((full.correct & ~early.correct).sum()),
                int((early.correct & ~full.correct).sum()),
                float(full.nfe.mean()),
                float(early.nfe.mean()),
                float(early.settled.mean()),
            )
        )
    return rows


def steps_to_settle(recording: Recording, tol: float) -> tuple[Ints, Bools, Bools]:
    """Of the first trajectory of each puzzle: when it settles, int64 [N] (D where it does not), whether it does, bool
    [N], and whether it is right there, bool [N]."""
    first = outcome(recording, Policy("residual", recording.depth, 1, tol))
    return first.steps, first.settled, first.correct
