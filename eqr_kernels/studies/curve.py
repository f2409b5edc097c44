"""The map of a model: one recording, what its steps cost, what every policy then answers, and what to choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eqr_kernels.noise import noise_floor
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import card_in
from eqr_kernels.studies.checking import check
from eqr_kernels.studies.costs import Price, UnitCosts, measure_costs
from eqr_kernels.studies.curve_report import (
    CheckedPoint,
    EarlyExit,
    GroupSteps,
    Recommendation,
    Residuals,
    Settings,
    Settling,
    TurnSettings,
)
from eqr_kernels.studies.front import recommend
from eqr_kernels.studies.identity import what_decides
from eqr_kernels.studies.points import Point, bend, map_points, savings, steps_to_settle
from eqr_kernels.studies.recording import FORMAT, Recording, chunk_size, held_bytes, record, recordable_depths
from eqr_kernels.studies.replay import outcome, policies
from eqr_kernels.studies.statistics import auroc
from eqr_kernels.studies.store import Store
from eqr_kernels.studies.subset import digest
from eqr_kernels.studies.types import Bools
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.views import MakeViews, Turns
from eqr_kernels.tolerance import card_tolerance

_BINS = 40
_CHECKED_AT_MOST = 6
_TOLERANCES = (0.75, 1.0, 1.5, 2.5, 5.0, 10.0)
_COSTS: dict[str, Callable[[Point], float]] = {
    "nfe": lambda p: p.nfe,
    "ms": lambda p: p.latency_ms[1],
    "s": lambda p: p.unit_seconds,
}


class Meter(Protocol):
    """Shows the progress of a piece of work."""

    def update(self, done: float, total: float) -> None: ...


Progressing = Callable[[str], AbstractContextManager[Meter]]
"""What shows a piece of work of that name."""


@dataclass(frozen=True)
class Request:
    """What is to be mapped.

    Attributes:
        depth, breadth: at most.
        views: gives each trajectory of a puzzle a view of its own, see `solve_views`; None: they differ in their random
            starts.
        turns: of each trajectory, see `solve`; None: none.
        tols: tolerances of the residual exit. select: which trajectory answers.
        quick: short timings, and few points run for real.
        seed: of starts and noise. options: further arguments of `solve` (window, noise_scale, slots, backend,
            precision).
        price: of an hour of the machine.
        target: accuracy wanted. budget: the most to spend and its unit: "nfe" or "s" a puzzle, "ms" at the p95 of a
            query alone, or the price's currency for 1,000 puzzles. budget_text: as it was asked for.
    """

    depth: int
    breadth: int
    tols: tuple[float, ...]
    select: str = "residual"
    quick: bool = False
    seed: int = 0
    views: MakeViews | None = None
    turns: Turns | None = None
    options: dict[str, Any] = field(default_factory=dict)
    price: Price | None = None
    target: float | None = None
    budget: tuple[float, str] | None = None
    budget_text: str | None = None


def usual_tolerances(
    model: EquilibriumReasoner, noise_scale: float | None, precision: str = "auto"
) -> tuple[float, ...]:
    """The card's tolerances and some around them, or around what the noise leaves; rising."""
    floor = noise_floor(model.inference_noise_scale if noise_scale is None else noise_scale)
    card = card_in(model, precision)
    known = [tol for tol in (card.tol, card.tol_fast) if tol] if card else []
    middle = (known or [2 * floor or 0.01])[0]
    # Below the noise's own residual a tolerance never fires.
    middle = middle if middle * _TOLERANCES[-1] > floor else 2 * floor
    around = {float(f"{factor * middle:.4g}") for factor in _TOLERANCES}
    return tuple(sorted(value for value in {*around, *known} if value > floor))


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the limit itself."""
    return (*(1 << k for k in range(limit.bit_length()) if 1 << k < limit), limit)


class CurveMap:
    """A map in the making: the recording can be interrupted and gone on with, and all else follows from it.

    Args:
        model, puzzles: with labels. request: what is wanted.
        folder: of what was run. fresh: forget what it holds.

    Raises:
        OtherRecording: the folder holds one.
    """

    def __init__(
        self, model: EquilibriumReasoner, puzzles: PuzzleSet, weights: str, request: Request, folder: Path, fresh: bool
    ) -> None:
        assert puzzles.labels is not None
        self.model, self.puzzles, self.request, self.labels = model, puzzles, request, puzzles.labels
        self.depths, self.breadths = powers_of_two(request.depth), powers_of_two(request.breadth)
        options = request.options
        run_by = dict(backend=options["backend"], precision=options["precision"], turns=request.turns)
        self.recorded = recordable_depths(model, request.depth, self.depths, **run_by)
        self.decides = what_decides(model, options, turns=request.turns is not None)
        sizes = self.recorded, request.breadth, model.device.type
        held = held_bytes(model, request.views, request.turns, request.depth, request.breadth)
        self.chunk = chunk_size(len(puzzles), model.config.seq_len, *sizes, resumable=True, held=held)
        identity = {
            "weights": weights,
            "puzzles": digest(puzzles.inputs, puzzles.labels),
            "depth": request.depth,
            "recorded_depths": self.recorded,
            "breadth": request.breadth,
            "seed": request.seed,
            **({} if request.views is None else {"views": True}),
            **({} if request.turns is None else {"turn_every": request.turns.every, "turn_cycle": request.turns.cycle}),
            "format": FORMAT,
            **self.decides,
            "chunk": self.chunk,
        }
        if fresh:
            Store.discard(folder)
        self.store = Store(folder, identity)

    def run(self, showing: Progressing) -> dict[str, Any]:
        """The measured fields of a `CurveReport`."""
        request, model, puzzles = self.request, self.model, self.puzzles
        with showing("running all puzzles") as bar:
            recording = record(
                model,
                puzzles.inputs,
                self.labels,
                depths=self.recorded,
                breadth=request.breadth,
                views=request.views,
                turns=request.turns,
                chunk=self.chunk,
                parts=self.store,
                seed=request.seed,
                progress=bar.update,
                **request.options,
            )
        with showing("timing outer steps") as bar:
            costs = measure_costs(
                model,
                puzzles.inputs,
                self.breadths,
                turns=request.turns,
                depths=sorted({min(16, request.depth), request.depth, 16 * request.depth}),
                seconds=0.1 if request.quick else 0.3,
                rounds=3 if request.quick else 7,
                progress=bar.update,
                **request.options,
            )
        mapped = policies(self.depths, self.breadths, request.tols, select=request.select)
        points = map_points(recording, mapped, costs, request.price)
        chosen = choose(points, request)
        with showing("checking points") as bar:
            checked = self._check(recording, points, costs, chosen, bar)
        known, config = card_tolerance(card_in(model, request.options.get("precision", "auto"))), model.config
        tol = None if known is None else known.value
        return dict(
            settings=self._settings(recording, tol),
            backend=recording.backend,
            backend_reason=recording.backend_reason,
            layers_per_step=config.H_cycles * (config.L_cycles + 1) * config.L_layers,
            unit_costs=costs,
            points=tuple(points),
            bend=bend(points),
            checked=tuple(checked),
            early_exit=None
            if tol is None
            else EarlyExit(tol, tuple(savings(recording, self.breadths, tol=tol, select=request.select))),
            settling=None if tol is None else settling(puzzles, recording, tol),
            residuals=residuals(recording),
            recommendation=recommendation(points, chosen, request),
        )

    def _settings(self, recording: Recording, tol: float | None) -> Settings:
        names, turns = ("noise_scale", "window", "precision", "instruction_set", "config"), self.request.turns
        return Settings(
            depth=self.request.depth,
            breadth=self.request.breadth,
            views=self.request.views is not None,
            turns=None if turns is None else TurnSettings(turns.every, turns.cycle),
            depths=self.depths,
            breadths=self.breadths,
            tols=self.request.tols,
            recorded_depths=None if recording.every_step else self.recorded,
            card_tol=tol,
            select=self.request.select,
            seed=self.request.seed,
            slots=self.request.options["slots"],
            price=self.request.price,
            **{name: self.decides[name] for name in names},
        )

    def _check(
        self, recording: Recording, points: Sequence[Point], costs: UnitCosts, chosen: int | None, bar: Meter
    ) -> list[CheckedPoint]:
        """The points that are singled out, and some of the front between them, run for real."""
        bends, quick = bend(points), self.request.quick
        why: dict[int, list[str]] = {}
        named = {
            "best": bends.best,
            "cheapest within 0.5 points": bends.cheapest_within,
            "knee": bends.knee,
            "recommended": chosen,
        }
        for name, index in named.items():
            if index is not None:
                why.setdefault(index, []).append(name)
        spread = np.linspace(0, len(bends.front) - 1, _CHECKED_AT_MOST).round().astype(int)
        for place in spread if not quick else ():
            if len(why) < _CHECKED_AT_MOST:
                why.setdefault(bends.front[place], ["front"])
        rows = []
        for index, reasons in sorted(why.items()):
            point = points[index]
            replayed = outcome(recording, point.policy)
            run = check(
                self.model,
                self.puzzles.inputs,
                self.labels,
                point,
                replayed,
                costs.query_ms(point.policy.breadth, replayed.nfe, replayed.longest, replayed.one_by_one),
                seconds=2.0 if quick else 10.0,
                views=self.request.views,
                turns=self.request.turns,
                seed=self.request.seed,
                **self.request.options,
            )
            rows.append(CheckedPoint(index, tuple(reasons), run))
            bar.update(len(rows), len(why))
        return rows


def group_sizes(puzzles: PuzzleSet) -> dict[str, int]:
    """How many puzzles come from each source, in order of appearance."""
    names = puzzles.source.tolist()
    return {name: names.count(name) for name in dict.fromkeys(names)}


def settling(puzzles: PuzzleSet, recording: Recording, tol: float) -> Settling:
    """When the puzzles of each source settle."""
    steps, settled, correct = steps_to_settle(recording, tol)

    def histogram(rows: Bools) -> tuple[int, ...]:
        return tuple(np.bincount(steps[rows], minlength=recording.depth + 1)[1:].tolist())

    groups = []
    for name, count in group_sizes(puzzles).items():
        rows = (puzzles.source == name) & settled
        groups.append(GroupSteps(name, count, histogram(rows & correct), histogram(rows & ~correct)))
    return Settling(tol, tuple(groups))


def residuals(recording: Recording) -> Residuals:
    """Of all trajectories at the full depth."""
    last, right = recording.residual[:, :, -1].ravel(), recording.correct[:, :, -1].ravel()
    sound = np.isfinite(last) & ~recording.diverged[:, :, -1].ravel()
    area = auroc(np.where(sound, last, np.inf), right)
    shown = np.log10(np.maximum(last[sound], 1e-12))
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (-1.0, 0.0)
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    return Residuals(
        trajectories=len(right),
        right=int((right & sound).sum()),
        diverged=int((~sound).sum()),
        auroc=None if math.isnan(area) else area,
        log10_edges=tuple(edges.tolist()),
        right_counts=tuple(np.histogram(shown[right[sound]], edges)[0].tolist()),
        wrong_counts=tuple(np.histogram(shown[~right[sound]], edges)[0].tolist()),
    )


def choose(points: Sequence[Point], request: Request) -> int | None:
    """The point to recommend, see `recommend`; None where nothing was asked for or none will do."""
    if request.target is None and request.budget is None:
        return None
    limit, unit = request.budget or (None, "s")
    cost = [_COSTS.get(unit, lambda p: p.cost_per_1000 or 0.0)(p) for p in points]
    return recommend(cost, [p.accuracy.share for p in points], target=request.target, budget=limit)


def recommendation(points: Sequence[Point], chosen: int | None, request: Request) -> Recommendation | None:
    """What to call `solve` with, and why; None where nothing was asked for."""
    target, budget = request.target, request.budget_text
    if target is None and budget is None:
        return None
    wanted = " and ".join([*([f"accuracy {target:g}"] if target else []), *([f"at most {budget}"] if budget else [])])
    if chosen is None:
        best = max(p.accuracy.share for p in points)
        if target and best < target:
            why = f"the most accurate reaches {best:.3f}; `eqr diagnose` says whether more depth or breadth can help"
        else:
            why = "what is as cheap is not as accurate; raise --budget" if target else "all cost more; raise --budget"
        return Recommendation(target, budget, None, None, f"no point of the map offers {wanted}: {why}")
    point = points[chosen]
    low, high = point.accuracy.interval
    # A noise scale of 0 was asked for; a seed of 0 is what solve takes anyway.
    options = {name: value for name, value in request.options.items() if value not in (None, "auto")}
    options |= {"seed": request.seed} if request.seed else {}
    reason = (
        f"{'the cheapest' if target else 'the most accurate'} point that offers {wanted}: "
        f"{point.accuracy.share:.3f} ({low:.3f} to {high:.3f}) on the same puzzles that it was chosen on"
    )
    if target and low < target:
        reason += f"; with so few puzzles it is not sure to reach {target:g} on others"
    call = point.policy.call(views=request.views is not None, **options)
    return Recommendation(target, budget, chosen, call, reason)
