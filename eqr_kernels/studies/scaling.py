"""What more depth and more breadth do for a model on some puzzles, and what its trajectories do meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqr_kernels.studies import dynamics as convergence
from eqr_kernels.studies.agreement import Agreement, agreement
from eqr_kernels.studies.attractors import BROAD, Diagnosis, diagnose
from eqr_kernels.studies.coupling import Coupling, couple
from eqr_kernels.studies.paired import Paired, pair
from eqr_kernels.studies.probing import Probe, noise_floor


@dataclass(frozen=True)
class Quartiles:
    """Of the finite ones of some values; NaN where there are none."""

    count: int
    low: float
    median: float
    high: float


def quartiles(values: npt.ArrayLike) -> Quartiles:
    """Quartiles of the finite values of an array of any shape."""
    v = np.asarray(values, np.float64)
    v = v[np.isfinite(v)]
    return Quartiles(len(v), *(np.quantile(v, (0.25, 0.5, 0.75)).tolist() if len(v) else [math.nan] * 3))


@dataclass(frozen=True)
class Convergence:
    """How trajectories settle.

    Attributes:
        trajectories: N B; settled: at the full depth; unsteady: those of them whose answer changed after they had met
            the tolerance; left: met the tolerance at some step, and are above it at the full depth.
        steps: (median, 95th percentile) of the steps to the tolerance, of those that have settled; NaN where none have.
        rate: contraction rate a step of those that have settled and show it.
        floor: level at which those that have settled came to rest; steady_level: median of those at rest above the
            tolerance, NaN where there are none.
        expected_floor: see `noise_floor`.
        late, open: of the trajectories that had not met the tolerance by half the depth (`open`), those that have
            settled at the full one.
        settled_puzzles: puzzles with settled trajectories.
    """

    trajectories: int
    settled: int
    unsteady: int
    left: int
    steps: tuple[float, float]
    rate: Quartiles
    floor: Quartiles
    steady_level: float
    expected_floor: float
    late: int
    open: int
    settled_puzzles: int


@dataclass(frozen=True)
class Trend:
    """Residuals of the trajectories of a group ("right" or "wrong" at the full depth) at one depth."""

    depth: int
    group: str
    residual: Quartiles


@dataclass(frozen=True)
class Scaling:
    """The whole diagnosis in numbers.

    Attributes:
        puzzles, labelled: N, and those of them with labels; restarts: B; depths: rising.
        convergence: see there.
        trends: at each depth, of both groups; trajectories of puzzles without labels are in neither.
        kinds: for each of `convergence.KINDS`, trajectories by group: right, wrong, unlabelled.
        periods: period -> trajectories.
        correct: by rule, labelled puzzles right at (each depth, each of the breadths 1 and B), int [K][L].
        by_depth: from half the depth to the full one at breadth B, by residual; None at depth 1.
        by_breadth: from breadth 1 to B at the full depth, by residual.
        by_rule: from residual to each other rule, at the full depth and breadth. "any" only gains: what is left.
        oracle: from breadth 1 to any of the B at the full depth: all that breadth could buy.
        agreement, modes, coupling: at the full depth.
        settled_lost: of the trajectories of the puzzles without a correct attractor, the share that has settled; NaN
            where there are none.
        mixed: puzzles with right trajectories, and puzzles with wrong ones.
    """

    puzzles: int
    labelled: int
    restarts: int
    depths: tuple[int, ...]
    convergence: Convergence
    trends: tuple[Trend, ...]
    kinds: dict[str, dict[str, int]]
    periods: dict[int, int]
    correct: dict[str, list[list[int]]]
    by_depth: Paired | None
    by_breadth: Paired
    by_rule: dict[str, Paired]
    oracle: Paired
    agreement: Agreement
    modes: Diagnosis
    coupling: Coupling
    settled_lost: float
    mixed: tuple[int, int]


def summarise(told: Probe, *, broad: float = BROAD) -> Scaling:
    """The numbers of a diagnosis: see `Scaling`.

    Args:
        broad: share of the restarts that makes a broad basin, see `diagnose`.
    """
    found = told.evaluation
    assert found.all_settled is not None
    known = found.labelled
    right, settled = found.all_exact[:, -1], found.all_settled[:, -1]  # [N, B]
    grid = found.grid[known]  # [M, K, L, R]
    group = np.where(known[:, None], np.where(right, "right", "wrong"), "unlabelled")
    rule = {name: r for r, name in enumerate(found.rules)}
    by, last = rule["residual"], grid[:, -1, -1]  # [M, R]
    modes = diagnose(right, settled, labelled=known, broad=broad)
    lost = modes.puzzle[[mode == "no correct attractor" for mode in modes.mode]]
    fields = (found.all_exact, found.all_accuracy, found.all_residual, found.all_score, found.all_diverged)
    depth, half = found.depths[-1], max(1, found.depths[-1] // 2)
    periods, counts = np.unique(told.period[told.period > 0], return_counts=True)
    return Scaling(
        puzzles=len(known),
        labelled=int(known.sum()),
        restarts=right.shape[1],
        depths=found.depths,
        convergence=_convergence(told, half),
        trends=tuple(
            Trend(at, name, quartiles(found.all_residual[:, k][group == name]))
            for k, at in enumerate(found.depths)
            for name in ("right", "wrong")
        ),
        kinds={
            kind: {
                name: int(((told.kind == kind) & (group == name)).sum()) for name in ("right", "wrong", "unlabelled")
            }
            for kind in convergence.KINDS
        },
        periods=dict(zip(periods.tolist(), counts.tolist(), strict=True)),
        correct={name: grid[..., r].sum(0).tolist() for name, r in rule.items()},
        by_depth=None if depth == 1 else pair(grid[:, found.depths.index(half), -1, by], last[:, by]),
        by_breadth=pair(grid[:, -1, 0, by], last[:, by]),
        by_rule={name: pair(last[:, by], last[:, r]) for name, r in rule.items() if r != by},
        oracle=pair(grid[:, -1, 0, by], last[:, rule["any"]]),
        agreement=agreement(told.codes, right, settled, found.all_diverged[:, -1], known),
        modes=modes,
        coupling=couple(depth, *(field[:, -1] for field in fields)),
        settled_lost=float(settled[lost].mean()) if len(lost) else math.nan,
        mixed=(int(right[known].any(1).sum()), int((~right[known]).any(1).sum())),
    )


def _convergence(told: Probe, half: int) -> Convergence:
    found = told.evaluation
    assert found.all_settled is not None and found.steps is not None and found.converged is not None
    settled = found.all_settled[:, -1]
    steps = found.steps[settled]
    waiting = ~(found.converged & (found.steps <= half))
    if found.depths[-1] == 1:
        waiting = np.zeros_like(waiting)
    return Convergence(
        trajectories=settled.size,
        settled=int(settled.sum()),
        unsteady=int(told.unsteady.sum()),
        left=int((found.converged & ~settled).sum()),
        steps=(float(np.quantile(steps, 0.5)), float(np.quantile(steps, 0.95))) if len(steps) else (math.nan, math.nan),
        rate=quartiles(told.rate),
        floor=quartiles(told.level[settled]),
        steady_level=quartiles(told.level[told.kind == "steady"]).median,
        expected_floor=noise_floor(told.noise_scale),
        late=int((waiting & settled).sum()),
        open=int(waiting.sum()),
        settled_puzzles=int(settled.any(1).sum()),
    )
