"""A trainer of a toy task, and its comparison with another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.stream import PuzzleStream, RevealPoint
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.models import tiny_config


def toy_puzzles(n: int = 40) -> PuzzleSet:
    """Six tokens in 1..6; the answer is the input shifted by one value."""
    inputs = np.random.default_rng(0).integers(1, 7, (n, 6)).astype(np.uint8)
    labels = (inputs % 6 + 1).astype(np.uint8)
    return PuzzleSet(inputs, labels, np.array(["toy"] * n), np.zeros(n, np.int64))


def keep(inputs, labels, rng):
    return inputs, labels


def toy_stream(seed: int = 0) -> PuzzleStream:
    return PuzzleStream(toy_puzzles(), keep, seed=[seed, 0])


def make_trainer(seed: int = 0, noise_scale: float = 0.01, **changes: object) -> Trainer:
    config = TrainSettings(batch_size=8, lr=3e-3, lr_warmup_steps=2, total_steps=None, compile=False, seed=seed)
    torch.manual_seed(seed)
    model = EquilibriumReasoner(tiny_config(noise_scale=noise_scale, halt_max_steps=4))
    return Trainer(model, toy_stream(seed), replace(config, **changes))


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that later steps depend on, unrounded."""
    return {
        **trainer.model.state_dict(),
        **{f"ema.{name}": average for name, average in trainer.ema.shadow.items()},
        **trainer.moments(),
        **{f"rows.{name}": value for name, value in vars(trainer.rows).items()},
        "generator": trainer.generator.get_state(),
    }


def states_equal(a: Trainer, b: Trainer) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys() and any(name.startswith("exp_avg_sq.") for name in left)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
    assert a.stream.state == b.stream.state and a.step == b.step


def losses(trainer: Trainer, steps: int) -> list[float]:
    results = []
    for _ in range(steps):
        trainer.train_step()
        results.append(trainer.report().loss)
    return results


def roll(inputs, labels, rng):
    """A random rotation of each row."""
    index = (np.arange(6) + rng.integers(6, size=(len(inputs), 1))) % 6
    return np.take_along_axis(inputs, index, 1), np.take_along_axis(labels, index, 1)


def show(inputs, labels, clues, rng):
    """Writes the number of clues in the first token."""
    return np.concatenate([clues[:, None].astype(np.uint8), inputs[:, 1:]], 1)


def make_stream(**changes: Any) -> PuzzleStream:
    options = dict(reveal=show, curriculum=[RevealPoint(0, 0, 0), RevealPoint(40, 40, 40)], seed=9)
    return PuzzleStream(toy_puzzles(), roll, **{**options, **changes})
