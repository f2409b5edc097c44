"""Measures one trained row on puzzles that no row has seen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.studies.ablation import training
from benchmarks.studies.ablation.rows import Choice
from benchmarks.studies.ablation.settings import EvaluationSettings, TrainingSettings
from benchmarks.studies.ablation.stack import BlockStack, residual
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.studies.scoring import Accuracy, exact_match
from eqr_kernels.studies.statistics import auroc
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet, Tokens

RECORD = "evaluation.json"
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
_STACK_CHUNK = 32


def draw_levels(puzzles: PuzzleSet, settings: EvaluationSettings) -> dict[int, tuple[Tokens, Tokens]]:
    """Inputs and labels [N, 81] of each level of clues: the same puzzles at all levels, and for every row.

    A puzzle that has more clues as published keeps them. What is shown at one level is shown at every easier one too.

    Raises:
        ValueError: there are fewer puzzles than wanted, or they lack answers.
    """
    if puzzles.labels is None or len(puzzles) < settings.puzzles:
        raise ValueError(f"{settings.puzzles} puzzles with answers are wanted, the file holds {len(puzzles)}")
    index = np.sort(np.random.default_rng(settings.seed).permutation(len(puzzles))[: settings.puzzles])
    inputs, labels = puzzles.inputs[index], puzzles.labels[index]
    return {
        clues: (sudoku.reveal(inputs, labels, clues, np.random.default_rng(settings.seed)), labels)
        for clues in settings.clues
    }


def _auroc(residuals: Floats, right: Bools) -> float | None:
    """AUROC of residuals [N] that predict right [N]; None where all or none are right."""
    value = auroc(residuals, right)
    return None if np.isnan(value) else value


class Measured:
    """One level: whether the answers are right at each depth, bool [N, K], by breadth, and the last residuals [N]."""

    def __init__(self, depths: tuple[int, ...], exact: dict[int, Bools], residuals: Floats | None) -> None:
        self.depths, self.exact, self.residuals = depths, exact, residuals

    @property
    def right(self) -> Bools:
        """bool [N]: of a single trajectory at the greatest depth."""
        return self.exact[1][:, -1]

    def report(self) -> dict[str, Any]:
        measurement: dict[str, Any] = {"exact": {str(b): self._by_depth(exact) for b, exact in self.exact.items()}}
        if self.residuals is None:
            return measurement
        finite = np.isfinite(self.residuals)
        return measurement | {
            "residual": _mean(self.residuals[finite]),
            "residual_right": _mean(self.residuals[finite & self.right]),
            "residual_wrong": _mean(self.residuals[finite & ~self.right]),
            "not_finite": int((~finite).sum()),
            "auroc": _auroc(self.residuals, self.right),
        }

    def _by_depth(self, exact: Bools) -> dict[str, Any]:
        return {str(d): Accuracy.of(right).as_json() for d, right in zip(self.depths, exact.T, strict=True)}


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def measure(
    model: BlockStack | EquilibriumReasoner,
    inputs: Tokens,
    labels: Tokens,
    depths: tuple[int, ...],
    settings: EvaluationSettings,
) -> Measured:
    """One level of one row: inputs, labels [N, S]."""
    tokens = torch.from_numpy(inputs.astype(np.int64))
    if isinstance(model, BlockStack):
        return _measure_stack(model, tokens, labels, depths)
    # From the same start without noise all trajectories are one.
    breadth = 1 if model.config.fixed_init and not model.config.noise_scale else settings.breadth
    result = model.solve(
        tokens,
        depth=depths[-1],
        breadth=breadth,
        halt="none",
        checkpoints=depths,
        seed=settings.seed,
        precision=settings.precision,
    )
    exact = {1: np.stack([exact_match(result.at[d].all_preds[:, 0].cpu().numpy(), labels) for d in depths], 1)}
    if breadth > 1:
        exact[breadth] = np.stack([exact_match(result.at[d].preds.cpu().numpy(), labels) for d in depths], 1)
    residuals = result.all_residual[:, 0].cpu().numpy()
    return Measured(depths, exact, np.where(np.isfinite(residuals), residuals, np.inf).astype(np.float32))


@torch.inference_mode()
def _measure_stack(model: BlockStack, tokens: torch.Tensor, labels: Tokens, depths: tuple[int, ...]) -> Measured:
    exact, last = [], []
    for first in range(0, len(tokens), _STACK_CHUNK):
        rows = slice(first, first + _STACK_CHUNK)
        z = model.start(len(tokens[rows]))
        answered = []
        for depth in range(1, depths[-1] + 1):
            before = z
            z, logits, _ = model(tokens[rows], z)
            if depth in depths:
                answered.append(exact_match(logits.argmax(-1).numpy(), labels[rows]))
        exact.append(np.stack(answered, 1))
        last.append(residual(z, before).numpy())
    # A single pass starts at nothing, so its change says nothing.
    residuals = np.concatenate(last) if depths[-1] > 1 else None
    return Measured(depths, {1: np.concatenate(exact)}, residuals)


def evaluate(
    choice: Choice, common: TrainingSettings, settings: EvaluationSettings, puzzles: PuzzleSet, folder: Path
) -> dict[str, Any]:
    """Measures the row in `folder`, or gives back what was measured with the same settings before."""
    wanted = json.loads(json.dumps(settings.to_json()))
    if (folder / RECORD).is_file():
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["settings"] == wanted:
            return record
    model, depths = training.load(choice, common, folder), _depths(choice, settings)
    levels, measured, begun = [], [], time.perf_counter()
    for clues, (inputs, labels) in draw_levels(puzzles, settings).items():
        measurement = measure(model, inputs, labels, depths, settings)
        levels.append({"clues": clues, **measurement.report()})
        measured.append(measurement)
        shares = ", ".join(f"{d}: {a:.1%}" for d, a in zip(depths, measurement.exact[1].mean(0), strict=True))
        print(f"{choice.key}: {clues or 'published'} clues, exact by depth {shares}", flush=True)
    record = {
        "row": choice.key,
        "settings": wanted,
        "depths": list(depths),
        "levels": levels,
        "pooled_auroc": _pooled(measured),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    atomic_write(folder / RECORD, json.dumps(record, indent=1).encode())
    return record


def _depths(choice: Choice, settings: EvaluationSettings) -> tuple[int, ...]:
    """Depths of a row: a feed-forward network has but one."""
    if choice.row.distinct:
        return (1,)
    return settings.passes if choice.row.is_stack and not choice.row.online else settings.depths


def _pooled(measured: list[Measured]) -> float | None:
    """AUROC over the puzzles of all levels."""
    residuals = [m.residuals for m in measured if m.residuals is not None]
    return _auroc(np.concatenate(residuals), np.concatenate([m.right for m in measured])) if residuals else None
