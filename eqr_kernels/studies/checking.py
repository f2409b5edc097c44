"""Points of the map run for real: what `solve` answers and takes, beside what was computed for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies import meters
from eqr_kernels.studies.points import Point
from eqr_kernels.studies.replay import Outcome
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.tasks.views import MakeViews
from eqr_kernels.views import solve_puzzles


@dataclass(frozen=True)
class Checked:
    """What a policy did on puzzles in one call, and with single queries; beside it what the map has for the same ones.

    Attributes:
        puzzles: of the one call.
        correct, computed_correct: its right answers. nfe, computed_nfe: its outer steps a puzzle.
        throughput: its puzzles a second.
        queries: puzzles that were solved alone; latency_ms, computed_ms: p50, p95, p99 of those.
    """

    puzzles: int
    correct: int
    computed_correct: int
    nfe: float
    computed_nfe: float
    throughput: float
    queries: int
    latency_ms: tuple[float, float, float]
    computed_ms: tuple[float, float, float]

    @property
    def latency_error(self) -> float:
        """Of the map's p50, as a share of what was measured."""
        return self.computed_ms[0] / self.latency_ms[0] - 1


def check(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    point: Point,
    replayed: Outcome,
    computed_ms: npt.NDArray[np.float64],
    *,
    seconds: float = 10.0,
    least: int = 8,
    progress: Callable[[int, int], object] | None = None,
    views: MakeViews | None = None,
    **options: Any,
) -> Checked:
    """Runs a point's policy on all puzzles at once, then puzzle by puzzle.

    Where one of the two would take much longer than `seconds`, it runs on some of the puzzles, spread over the set.

    Args:
        inputs, labels: integers [N, S].
        replayed, computed_ms: what the map has for each puzzle: its outcome, and the latency of its query [N].
        seconds: that either should take, about.
        least: puzzles in either, however long they take (fewer where there are fewer).
        progress: called with (queries done, at most).
        views: as for `record`.
        options: further arguments of `solve`.
    """
    questions, answers = np.asarray(inputs), np.asarray(labels)
    arguments: dict[str, Any] = {**point.policy.arguments(), "views": views, **options}
    # Spread over the file, whose puzzles may be sorted; the same ones whenever it is run.
    order = np.random.default_rng(0).permutation(len(questions))
    solve_puzzles(model, questions[order[:1]], **arguments)
    meters.synchronize(model.device)
    begun = time.perf_counter()
    rows = order[: max(least, int(seconds * point.throughput))]
    result = solve_puzzles(model, questions[rows], **arguments)
    meters.synchronize(model.device)
    taken = time.perf_counter() - begun
    times: list[float] = []
    for row in order:
        if len(times) >= least and sum(times) > seconds:
            break
        begun = time.perf_counter()
        solve_puzzles(model, questions[row : row + 1], **arguments)
        meters.synchronize(model.device)
        times.append(time.perf_counter() - begun)
        if progress is not None:
            progress(len(times), len(order))
    measured = np.percentile(np.array(times) * 1e3, (50, 95, 99))
    computed = np.percentile(computed_ms[order[: len(times)]], (50, 95, 99))
    return Checked(
        len(rows),
        int(exact_match(result.preds.cpu().numpy(), answers[rows]).sum()),
        int(replayed.correct[rows].sum()),
        float(result.nfe.double().mean()),
        float(replayed.nfe[rows].mean()),
        len(rows) / taken,
        len(times),
        (float(measured[0]), float(measured[1]), float(measured[2])),
        (float(computed[0]), float(computed[1]), float(computed[2])),
    )
