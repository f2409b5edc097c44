"""What is asked: real puzzles of mixed difficulty, when each comes, and what is the right answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.tasks import sudoku

EASY, HARD = "easy", "hard"


@dataclass(frozen=True)
class Workload:
    """Attributes:
    easy_share: of the requests; the others are hard. pool: different puzzles of each kind.
    clues: an easy puzzle shows between these, inclusive; a hard one is as published.
    """

    puzzles: str
    model: str = "sudoku-small"
    depth: int = 256
    tol: float | str = "fast"
    easy_share: float = 0.9
    pool: int = 60
    clues: tuple[int, int] = (36, 50)
    seed: int = 2608

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"puzzles": Path(self.puzzles).name}

    def load(self) -> EquilibriumReasoner:
        return EquilibriumReasoner.from_pretrained(self.model)

    def draw(self) -> Tensor:
        """int64 [2 * pool, 81]: the easy puzzles, then the hard ones."""
        all_puzzles = sudoku.load_csv(self.puzzles)
        assert all_puzzles.labels is not None
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(len(all_puzzles.inputs))[: 2 * self.pool]
        inputs, labels = all_puzzles.inputs[rows], all_puzzles.labels[rows]
        clues = rng.integers(self.clues[0], self.clues[1] + 1, self.pool)
        easy = sudoku.reveal(inputs[: self.pool], labels[: self.pool], clues, rng)
        return torch.from_numpy(np.concatenate([easy, inputs[self.pool :]]).astype(np.int64))

    def kind(self, puzzle: int) -> str:
        return EASY if puzzle < self.pool else HARD

    def ask(self, count: int, stream: int) -> np.ndarray:
        """Which puzzles are asked for, int64 [count]; equal for equal streams."""
        rng = np.random.default_rng([self.seed, stream])
        hard = rng.random(count) >= self.easy_share
        chosen: np.ndarray = rng.integers(0, self.pool, count) + hard * self.pool
        return chosen

    def arrivals(self, rate: float, seconds: float, stream: int) -> np.ndarray:
        """Poisson arrivals in [0, seconds), float64 [n], rising."""
        rng = np.random.default_rng([self.seed, stream, 1])
        gaps = rng.exponential(1 / rate, int(rate * seconds * 1.5) + 100)
        times = np.cumsum(gaps)
        return times[times < seconds]
