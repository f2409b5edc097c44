"""What more depth and more breadth do for a model on some puzzles, and what its trajectories do meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eqr_kernels.noise import noise_floor
from eqr_kernels.studies.agreement import Agreement, agreement
from eqr_kernels.studies.attractors import BROAD, Modes, modes
from eqr_kernels.studies.coupling import Coupling, couple
from eqr_kernels.studies.dynamics import KINDS, Dynamics, describe, doubling_depths, tail_depths
from eqr_kernels.studies.recording import Recording
from eqr_kernels.studies.replay import correct_grid, first_converged, settled
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.statistics import Paired, Quartiles, pair, quartiles

COMPARED = ("residual", "vote", "q", "any")
"""Rules of selection that are compared."""


def recorded_depths(depth: int) -> tuple[int, ...]:
    """What `summarise` needs of a run to a depth: its doublings, and its last steps, to see a cycle."""
    return tuple(sorted({*doubling_depths(depth), *tail_depths(depth)}))


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
        kinds: for each of `dynamics.KINDS`, trajectories by group: right, wrong, unlabelled.
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
    modes: Modes
    coupling: Coupling
    settled_lost: float
    mixed: tuple[int, int]

    def accuracy(self, rule: str, depth: int, breadth: int) -> Accuracy:
        """By a rule, at the depth and breadth of these indices."""
        return Accuracy(self.correct[rule][depth][breadth], self.labelled)

    def distinct_answers(self) -> dict[int, int]:
        """How many puzzles have so many different settled answers."""
        values, counts = np.unique(self.agreement.distinct, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def summarise(recording: Recording, *, tol: float, noise_scale: float, broad: float = BROAD) -> Scaling:
    """The numbers of a diagnosis: see `Scaling`.

    Args:
        recording: without halting, of at least the depths of `recorded_depths`.
        tol: residual that counts as settled. noise_scale: that was injected.
        broad: share of the restarts that makes a broad basin, see `modes`.
    """
    known, depths = recording.labelled, doubling_depths(recording.depth)
    moves = describe(recording, tol=tol, noise_scale=noise_scale)
    right, still = recording.correct[..., -1], settled(recording, tol)[..., -1]  # [N, B]
    grid = correct_grid(recording, depths, sorted({1, recording.breadth}), COMPARED)[known]  # [M, K, L, R]
    group = np.where(known[:, None], np.where(right, "right", "wrong"), "unlabelled")
    rule = {name: r for r, name in enumerate(COMPARED)}
    by, last = rule["residual"], grid[:, -1, -1]  # [M, R]
    basins = modes(right, still, labelled=known, broad=broad)
    lost = basins.puzzle[[mode == "no correct attractor" for mode in basins.mode]]
    depth, half = depths[-1], max(1, depths[-1] // 2)
    periods, counts = np.unique(moves.period[moves.period > 0], return_counts=True)
    return Scaling(
        puzzles=len(known),
        labelled=int(known.sum()),
        restarts=recording.breadth,
        depths=depths,
        convergence=_convergence(recording, moves, tol, noise_scale, half),
        trends=tuple(
            Trend(at, name, quartiles(recording.residual[..., recording.place(at)][group == name]))
            for at in depths
            for name in ("right", "wrong")
        ),
        kinds={
            kind: {
                name: int(((moves.kind == kind) & (group == name)).sum()) for name in ("right", "wrong", "unlabelled")
            }
            for kind in KINDS
        },
        periods=dict(zip(periods.tolist(), counts.tolist(), strict=True)),
        correct={name: grid[..., r].sum(0).tolist() for name, r in rule.items()},
        by_depth=None if depth == 1 else pair(grid[:, depths.index(half), -1, by], last[:, by]),
        by_breadth=pair(grid[:, -1, 0, by], last[:, by]),
        by_rule={name: pair(last[:, by], last[:, r]) for name, r in rule.items() if r != by},
        oracle=pair(grid[:, -1, 0, by], last[:, rule["any"]]),
        agreement=agreement(recording.answer[..., -1], right, still, recording.diverged[..., -1], known),
        modes=basins,
        coupling=couple(recording, depth),
        settled_lost=float(still[lost].mean()) if len(lost) else math.nan,
        mixed=(int(right[known].any(1).sum()), int((~right[known]).any(1).sum())),
    )


def _convergence(recording: Recording, moves: Dynamics, tol: float, noise_scale: float, half: int) -> Convergence:
    shape, depth = moves.kind.shape, recording.depth
    met_at, met = (x.reshape(shape) for x in first_converged(recording.residuals.reshape(-1, depth), tol))
    still = settled(recording, tol)[..., -1]
    steps = met_at[still]
    waiting = ~(met & (met_at <= half)) & (depth > 1)
    return Convergence(
        trajectories=still.size,
        settled=int(still.sum()),
        unsteady=int(moves.unsteady.sum()),
        left=int((met & ~still).sum()),
        steps=(float(np.quantile(steps, 0.5)), float(np.quantile(steps, 0.95))) if len(steps) else (math.nan, math.nan),
        rate=quartiles(moves.rate),
        floor=quartiles(moves.level[still]),
        steady_level=quartiles(moves.level[moves.kind == "steady"]).median,
        expected_floor=noise_floor(noise_scale),
        late=int((waiting & still).sum()),
        open=int(waiting.sum()),
        settled_puzzles=int(still.any(1).sum()),
    )
