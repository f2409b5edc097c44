"""What all rows have in common: how they are trained, on how much compute, and how they are measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from eqr_kernels import EqRConfig
from eqr_kernels.tasks.stream import RevealPoint
from eqr_kernels.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingSettings:
    """How every row is trained. Schedules are in shares of a row's own steps, for rows differ in how many they get.

    Attributes:
        config: the recurrence of the reasoners and the sizes of all rows.
        budget: operations that each row may spend, see `rows.FORMULA`.
        data_sha256: of the file of training puzzles.
        layers: block applications of a single pass.
        batch_size: rows of a training step; micro_batch: of those, in memory at a time in a stack.
        lr, lr_min_ratio, weight_decay: as in `TrainSettings`.
        warmup, ema_horizon: shares of the steps; the published ones, 2,000 and 1 / (1 - 0.999) of 50,000.
        curriculum: clues to show from a share of the steps on.
        forward_dtype, compile, seed: as in `TrainSettings`.
    """

    config: EqRConfig = field(default_factory=EqRConfig.sudoku_small)
    budget: float = 0.0
    data_sha256: str = ""
    layers: int = 42
    batch_size: int = 96
    micro_batch: int = 32
    lr: float = 1e-3
    lr_min_ratio: float = 1.0
    weight_decay: float = 1.0
    warmup: float = 0.04
    ema_horizon: float = 0.02
    curriculum: str = "0:34-50,0.5:30-46,1:24-42"
    forward_dtype: str = "float32"
    compile: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size must be a multiple of micro_batch={self.micro_batch}, got {self.batch_size}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        for name in ("warmup", "ema_horizon"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in (0, 1], got {getattr(self, name)}")

    def train_config(self, steps: int) -> TrainSettings:
        """For a row that gets `steps` steps."""
        return TrainSettings(
            batch_size=self.batch_size,
            lr=self.lr,
            lr_warmup_steps=round(self.warmup * steps),
            lr_min_ratio=self.lr_min_ratio,
            weight_decay=self.weight_decay,
            ema_rate=ema_rate(self.ema_horizon * steps),
            total_steps=steps,
            forward_dtype=self.forward_dtype,
            compile=self.compile,
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingSettings:
        return cls(**{**values, "config": EqRConfig.from_dict(values["config"])})


def ema_rate(horizon: float) -> float:
    """The rate of an average over the last `horizon` steps; 0, which takes the last weights, below one step."""
    return max(0.0, 1 - 1 / horizon) if horizon > 0 else 0.0


def parse_curriculum(text: str, steps: int) -> tuple[RevealPoint, ...]:
    """A curriculum such as "0:34-50,0.5:30-46,1:24-42", in shares of `steps`, as `PuzzleStream` takes it.

    Raises:
        ValueError: text of another form, or shares that do not rise from 0 to at most 1.
    """
    points, shares = [], []
    for part in text.split(","):
        try:
            share, clues = part.split(":")
            low, high = (int(clue) for clue in clues.split("-"))
            shares.append(float(share))
        except ValueError:
            raise ValueError(f'curriculum: {part!r} is not SHARE:LOW-HIGH, as in "0:34-50,1:24-42"') from None
        if not 0 <= low <= high <= 81:
            raise ValueError(f"curriculum: clues must be 0 <= LOW <= HIGH <= 81, got {low}-{high}")
        points.append(RevealPoint(round(shares[-1] * steps), low, high))
    if shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] > 1:
        raise ValueError(f"curriculum: shares must rise from 0 to at most 1, got {shares}")
    return tuple(points)


@dataclass(frozen=True)
class EvaluationSettings:
    """How every row is measured.

    Attributes:
        data_sha256: of the file of puzzles, which no row has seen.
        puzzles: how many of them, drawn with `seed`, the same for all rows.
        clues: levels: clues are revealed at random until a puzzle shows so many; 0 leaves it as published.
        depths: outer steps, or segments of the same number of block applications.
        passes: depths of the single-pass network that is weight-tied.
        breadth: trajectories of a puzzle, where a row has something random.
        precision: of `solve`; stacks run in float32.
    """

    data_sha256: str = ""
    puzzles: int = 100
    clues: tuple[int, ...] = (40, 34, 28, 0)
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    passes: tuple[int, ...] = (1, 2, 4, 8)
    breadth: int = 8
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depths", "passes"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != list(values) or values[0] != 1:
                raise ValueError(f"{name} must rise from 1, got {values}")
        if self.puzzles < 1 or self.breadth < 1:
            raise ValueError(f"puzzles and breadth must be at least 1, got {self.puzzles} and {self.breadth}")
        if not self.clues or any(not 0 <= c <= 81 for c in self.clues):
            raise ValueError(f"clues must be in 0..81, got {self.clues}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EvaluationSettings:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)
