"""Trains one row to the end of its budget, and keeps its averaged weights and a record of how it went."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.studies.ablation.rows import Choice, operator_config, shape, step_operations, training_steps
from benchmarks.studies.ablation.settings import TrainingSettings, parse_curriculum
from benchmarks.studies.ablation.stack import BlockStack, StackTrainer
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.checkpoint import ModelCard, save_checkpoint
from eqr_kernels.commit import code_commit
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet, Tokens
from eqr_kernels.tasks.stream import PuzzleStream
from eqr_kernels.training.trainer import Trainer

RECORD, WEIGHTS = "training.json", "model.safetensors"
_REPORTS = 40


class CountingStream(PuzzleStream):
    """A stream that counts what was drawn from it."""

    drawn = 0

    def draw(self, n: int, step: int) -> tuple[Tokens, Tokens]:
        self.drawn += n
        return super().draw(n, step)


def build(choice: Choice, settings: TrainingSettings) -> BlockStack | EquilibriumReasoner:
    """The untrained network of a row; the same for the same seed."""
    torch.manual_seed(settings.seed)
    row, config = choice.row, operator_config(choice.row, settings)
    if not row.is_stack:
        return EquilibriumReasoner(config)
    return BlockStack(config, shape(row, settings).applications // config.L_layers)


def trainer_of(choice: Choice, settings: TrainingSettings, puzzles: PuzzleSet, steps: int) -> Trainer | StackTrainer:
    """What trains a row in `steps` steps."""
    curriculum = parse_curriculum(settings.curriculum, steps)
    stream = CountingStream(
        puzzles, sudoku.augment, reveal=sudoku.reveal, curriculum=curriculum, seed=[settings.seed, 0]
    )
    model, config = build(choice, settings), settings.train_config(steps)
    if isinstance(model, EquilibriumReasoner):
        return Trainer(model, stream, config)
    segments = settings.config.halt_max_steps if choice.row.online else 1
    return StackTrainer(model, stream, config, segments=segments, micro_batch=settings.micro_batch)


def train(choice: Choice, common: TrainingSettings, puzzles: PuzzleSet, folder: Path) -> dict[str, Any]:
    """Trains a row into `folder`, or gives back the record of one that is there already.

    Returns:
        Steps, samples, compute, time and the course of the loss; also in `folder/training.json`.

    Raises:
        ValueError: the folder holds the row trained with other settings.
        RuntimeError: the loss is not finite.
    """
    settings = choice.settings(common)
    if (done := finished(choice, common, folder)) is not None:
        return done
    steps = training_steps(choice.row, settings)
    trainer = trainer_of(choice, settings, puzzles, steps)
    reports, begun, first_step = [], time.perf_counter(), 0.0
    while trainer.step < steps:
        trainer.train_step()
        if trainer.step == 1:
            first_step = time.perf_counter() - begun
        if trainer.step % math.ceil(steps / _REPORTS) == 0 or trainer.step == steps:
            progress = trainer.report()
            reports.append(dataclasses.asdict(progress))
            if not math.isfinite(progress.loss):
                raise RuntimeError(
                    f"{choice.title} has diverged at step {progress.step} of {steps}: the loss is {progress.loss}; "
                    f"train it with a lower rate than {settings.lr:g}, as in {choice.name}:lr={settings.lr / 3:.0e}"
                )
            print(
                f"{choice.key}: step {progress.step:,} of {steps:,}  loss {progress.loss:.4f}  exact "
                f"{progress.exact:.1%}  residual {progress.residual:.3f}  {progress.samples_per_second:.1f} samples/s",
                flush=True,
            )
    seconds = time.perf_counter() - begun
    stream = trainer.stream
    assert isinstance(stream, CountingStream)
    s = shape(choice.row, settings)
    record = {
        "row": choice.key,
        "title": choice.title,
        "about": choice.row.description,
        "settings": settings.to_json(),
        "operator": operator_config(choice.row, settings).to_dict(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "blocks": s.blocks,
        "applications": s.applications,
        "without_gradient": s.without_gradient,
        "operations_per_sample": step_operations(choice.row, settings),
        "operations": step_operations(choice.row, settings) * settings.batch_size * steps,
        "steps": steps,
        "samples": steps * settings.batch_size,
        "puzzles_drawn": stream.drawn,
        "schedule": dataclasses.asdict(settings.train_config(steps)),
        "kernel": trainer.kernel if isinstance(trainer, Trainer) else "PyTorch",
        "seconds": round(seconds, 2),
        "first_step_seconds": round(first_step, 2),
        "loss": statistics.fmean(r["loss"] for r in reports[-math.ceil(len(reports) / 10) :]),
        "commit": code_commit(),
        "reports": reports,
    }
    _keep(trainer, record, folder)
    return record


def finished(choice: Choice, common: TrainingSettings, folder: Path) -> dict[str, Any] | None:
    """The record of a row that has been trained into `folder`, None where it has not.

    Raises:
        ValueError: it was trained with other settings.
    """
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        return None
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    wanted = json.loads(json.dumps(choice.settings(common).to_json()))
    differ = [
        f"{name} (was {record['settings'].get(name)!r}, now {value!r})"
        for name, value in wanted.items()
        if record["settings"].get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{folder} holds the row trained with other settings: {'; '.join(differ)}; "
            "name another --runs, or remove it"
        )
    return record


def _keep(trainer: Trainer | StackTrainer, record: dict[str, Any], folder: Path) -> None:
    """Writes the averaged weights, then the record: a row counts as finished when both are there."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {**trainer.model.state_dict(), **trainer.ema.shadow}
    if isinstance(trainer, Trainer):
        card = ModelCard(trainer.model.config, steps=trainer.step, commit=record["commit"], notes=record["about"])
        save_checkpoint(folder, weights, trainer.model.config, card)
    else:
        data = safetensors.torch.save({name: w.detach().cpu().contiguous() for name, w in weights.items()})
        atomic_write(folder / WEIGHTS, data)
    atomic_write(folder / RECORD, json.dumps(record, indent=1).encode())


def load(choice: Choice, common: TrainingSettings, folder: Path) -> BlockStack | EquilibriumReasoner:
    """The trained network of a row, in eval mode."""
    if not choice.row.is_stack:
        return EquilibriumReasoner.from_pretrained(folder)
    model = build(choice, choice.settings(common))
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return model.eval()


def measure_rate(choice: Choice, common: TrainingSettings, puzzles: PuzzleSet, steps: int = 8) -> float:
    """Operations a second (those of `rows.FORMULA`) of a row's training, the median of `steps` after a warm-up."""
    settings = choice.settings(common)
    trainer = trainer_of(choice, settings, puzzles, 1000)
    times = []
    for _ in range(2 + steps):
        begun = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - begun)
    return step_operations(choice.row, settings) * settings.batch_size / float(np.median(times[2:]))
