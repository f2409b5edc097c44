"""What a training run measures of its averaged weights as it goes: a learning curve, and at the end the tolerance."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eqr_kernels import studies
from eqr_kernels.checkpoint import MODEL_FILE
from eqr_kernels.noise import noise_floor
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.results import SolveResult
from eqr_kernels.solver import DEFAULT_DEPTH
from eqr_kernels.studies.tolerance_card import store_tolerance
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.task import Reveals, Task
from eqr_kernels.training.objective import stablemax_cross_entropy

ALL = "all"
_LEAST_RIGHT = 20


@dataclass(frozen=True)
class EvaluationSet:
    """Puzzles of one kind: as published, or with clues revealed."""

    clues: str  # "published", or the number of clues shown
    puzzles: PuzzleSet


@dataclass(frozen=True)
class Measurement:
    """Averaged weights on the puzzles of one source and kind.

    Attributes:
        clues, source: see `EvaluationSet`; source "all" is all of them together.
        puzzles: how many.
        loss: token loss (stablemax cross-entropy) of the answers at the greatest depth.
        exact, cells: by depth, the share of the puzzles answered exactly right, and of their cells, clues included.
    """

    clues: str
    source: str
    puzzles: int
    loss: float
    exact: dict[int, float]
    cells: dict[int, float]


def evaluation_sets(task: Task, puzzles: PuzzleSet, count: int | None) -> list[EvaluationSet]:
    """A fixed subset of the puzzles, as published and, for a task with `easier_clues`, the same with so many shown.

    Each source gives as many, as far as it has them, by `stratified_subset` within it: the hard ones alone would tell
    nothing of a model that is young, and the easy ones nothing of one that is not.

    Args:
        count: puzzles of the subset; None takes all.
    """
    if count is not None and count < len(puzzles):
        puzzles = puzzles.subset(np.sort(np.concatenate(_by_source(puzzles, count))))
    sets = [EvaluationSet("published", puzzles)]
    if isinstance(task, Reveals) and task.easier_clues is not None:
        assert puzzles.labels is not None
        inputs = task.reveal(puzzles.inputs, puzzles.labels, task.easier_clues, np.random.default_rng(0))
        sets.append(EvaluationSet(str(task.easier_clues), dataclasses.replace(puzzles, inputs=inputs)))
    return sets


def _by_source(puzzles: PuzzleSet, count: int) -> list[npt.NDArray[np.int64]]:
    rows = sorted((np.flatnonzero(puzzles.source == source) for source in set(puzzles.source.tolist())), key=len)
    chosen = []
    for left, group in zip(range(len(rows), 0, -1), rows, strict=True):
        seats = min(len(group), round(count / left))
        count -= seats
        if seats:
            part = puzzles.subset(group)
            chosen.append(group[studies.stratified_subset(part.inputs, part.source, part.rating, seats)])
    return chosen


class Evaluator:
    """Measures averaged weights at several depths, always the full depth, so that no tolerance has a say.

    Args:
        sets: what to answer.
        depths: rising.
        precision: of solve, as the weights are trained in it.
    """

    def __init__(self, sets: Sequence[EvaluationSet], depths: Sequence[int], precision: str) -> None:
        self.sets, self.depths, self.precision = tuple(sets), tuple(depths), precision

    def __call__(self, model: EquilibriumReasoner) -> list[Measurement]:
        """The measurements of each set, its sources first and all of them together last."""
        return [measurement for one in self.sets for measurement in self._of(model, one)]

    def _of(self, model: EquilibriumReasoner, one: EvaluationSet) -> list[Measurement]:
        puzzles, losses = one.puzzles, []
        assert puzzles.labels is not None

        def observe(labels: npt.NDArray[np.integer], result: SolveResult) -> None:
            answers = torch.from_numpy(labels.astype(np.int64)).to(result.logits.device)
            losses.append(stablemax_cross_entropy(result.logits, answers).cpu().numpy())

        recording = studies.record(
            model,
            puzzles.inputs,
            puzzles.labels,
            depths=self.depths,
            trace=False,
            precision=self.precision,
            observe=observe,
        )
        loss = np.concatenate(losses)
        groups = {name: puzzles.source == name for name in sorted(set(puzzles.source.tolist()))}
        groups[ALL] = np.ones(len(puzzles), bool)
        return [
            Measurement(
                one.clues,
                name,
                int(rows.sum()),
                float(loss[rows].mean()),
                {d: float(recording.correct[rows, 0, k].mean()) for k, d in enumerate(self.depths)},
                {d: float(recording.accuracy[rows, 0, k].mean()) for k, d in enumerate(self.depths)},
            )
            for name, rows in groups.items()
        ]


class Stopwatch:
    """Seconds of a run's training, on the wall's clock and of all the process's threads, pauses left out.

    Args:
        seconds, cpu_seconds: spent before.
    """

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._since = self._now() - np.array([seconds, cpu_seconds])

    @staticmethod
    def _now() -> npt.NDArray[np.float64]:
        return np.array([time.monotonic(), time.process_time()])

    def read(self) -> dict[str, float]:
        """seconds and cpu_seconds by these names."""
        return dict(zip(("seconds", "cpu_seconds"), (self._now() - self._since).tolist(), strict=True))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begun = self._now()
        try:
            yield
        finally:
            self._since += self._now() - begun


CURVE = "curve.csv"
"""The learning curve in the folder of a run."""


class Curve:
    """The learning curve in a CSV file: a row for each measurement, with what the run had cost by then.

    Columns: step, samples, operations (of the training steps' matrix products, all processes), seconds and cpu_seconds
    (see `Stopwatch`; a stop by SIGSTOP counts in the first alone), lr, then the fields of `Measurement`, with the depth
    behind exact and cells.

    Args:
        path: continued where it is there; rows of steps that the run has not come to (it was killed) are dropped.
        depths: of the measurements.
        step: that the run is at.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, depths: Sequence[int], step: int) -> None:
        self.path = path
        measured = [f"{name}_{depth}" for name in ("exact", "cells") for depth in depths]
        costs = ["step", "samples", "operations", "seconds", "cpu_seconds", "lr"]
        self.columns = [*costs, "clues", "source", "puzzles", "loss", *measured]
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != self.columns:
                    raise ValueError(
                        f"{path} has the columns {', '.join(reader.fieldnames or ())}, and this run would write "
                        f"{', '.join(self.columns)}; give the same --eval-depths, or move the file away"
                    )
                self.rows = [row for row in reader if int(row["step"]) <= step]

    def has(self, step: int) -> bool:
        """Whether that step has been measured."""
        return any(row["step"] == str(step) for row in self.rows)

    def add(self, costs: dict[str, Any], measurements: Sequence[Measurement]) -> None:
        """Appends the rows of one evaluation."""
        for m in measurements:
            by_depth = {f"{name}_{d}": v for name in ("exact", "cells") for d, v in getattr(m, name).items()}
            row = {**costs, "clues": m.clues, "source": m.source, "puzzles": m.puzzles, "loss": m.loss, **by_depth}
            self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)


def calibrate_model(folder: Path, sets: Sequence[EvaluationSet], data: str, device: torch.device) -> str:
    """Finds the tolerances of a trained model and stores them in its card; a message that says which, or why not.

    A model that answers too few to tell gets none: they would mean nothing. Its card and the message say so.
    """
    weights = folder / MODEL_FILE
    model = EquilibriumReasoner.from_pretrained(weights).to(device)
    inputs, labels = (
        np.concatenate([np.asarray(getattr(one.puzzles, name)) for one in sets]) for name in ("inputs", "labels")
    )
    settings: dict[str, Any] = dict(
        depth=DEFAULT_DEPTH,
        reveal=None,
        seed=0,
        max_loss=0.0,
        trust=studies.TRUST,
        patience=1,
        noise_scale=model.inference_noise_scale,
    )
    depths = studies.recordable_depths(model, DEFAULT_DEPTH)
    recording = studies.record(model, inputs, labels, depths=depths, seed=0, noise_scale=settings["noise_scale"])
    right = int(recording.correct[:, 0, -1].sum())
    if right < _LEAST_RIGHT:
        few = f"only {right} of {len(labels)} calibration puzzles were right at depth {DEFAULT_DEPTH}"
        calibration = studies.Calibration(len(labels), DEFAULT_DEPTH, right, (), None, None, few)
    else:
        calibration = studies.calibrate(recording, floor=noise_floor(settings["noise_scale"]))
    kinds = " and ".join("as published" if one.clues == "published" else f"with {one.clues} clues" for one in sets)
    store_tolerance(weights, calibration, settings, f"{data}, {kinds}")
    parts = [] if calibration.trusted else [f"converged is no promise for this model: {calibration.missing}"]
    for name, t in (("tol", calibration.trusted), ("tol_fast", calibration.fast)):
        if t is not None:
            parts.append(
                f"{name} {t.tol:g} is stored in the card: {t.converged} of {calibration.puzzles} puzzles settle, "
                f"{t.right_when_converged} of them right, after a mean of {t.mean_steps:.1f} steps"
            )
    if calibration.fast is None:
        parts.append("the card has no tolerance, and solve takes a provisional one")
    return "; ".join(parts)
