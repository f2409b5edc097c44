"""What a backend is given and what it gives back: the fixed-point problem and its finished trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eqr_kernels.modules import EquilibriumReasoner


class Status(IntEnum):
    """How a trajectory ended."""

    CONVERGED = 0
    """Its residual was at most tol for `patience` consecutive outer steps."""
    HALTED = 1
    """q_halt was positive (halt="q")."""
    MAX_DEPTH = 2
    """It spent the whole depth."""
    CANCELLED = 3
    """It could no longer win its race, or the caller stopped the solve."""
    DIVERGED = 4
    """Its state or its logits became non-finite; logits and preds are the last finite ones."""


def settled(status: Tensor) -> Tensor:
    """bool, any shape: the halting rule fired (CONVERGED or HALTED)."""
    return (status == Status.CONVERGED) | (status == Status.HALTED)


@dataclass(frozen=True)
class FixedPointProblem:
    """N puzzles x B trajectories to iterate; checked by `solve`, so that a backend need not.

    Trajectory t belongs to puzzle t // breadth and has restart t % breadth.
    """

    tokens: Tensor  # int64 [N, S] on the model's device
    ids: Tensor  # int64 [N], key the random stream
    seed: int
    breadth: int
    depth: int
    halt: str  # "residual", "q" or "none"
    tol: float
    patience: int
    window: int
    noise_scale: float
    race: bool  # siblings that cannot be the first to halt may be cancelled
    checkpoints: tuple[int, ...]
    slots: int
    trace: bool
    dtype: torch.dtype

    @property
    def trajectories(self) -> int:
        return self.tokens.shape[0] * self.breadth


class Snapshot(NamedTuple):
    """m trajectories at some depth. Scores and residuals are float32."""

    number: Tensor  # int64 [m], of the trajectories
    preds: Tensor  # int64 [m, S]
    logits: Tensor  # float32 [m, S, V]
    q_halt: Tensor  # float32 [m]
    residual: Tensor  # [m]
    score: Tensor  # [m]
    steps: Tensor  # int64 [m]
    status: Tensor  # int64 [m]


class Recorder(Protocol):
    """Takes the results as they come."""

    def finished(self, rows: Snapshot) -> None:
        """Trajectories that have ended; each is given once."""

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        """Trajectories at a checkpoint; those that ended earlier are given as they ended."""

    def residual(self, number: Tensor, step: Tensor, residual: Tensor) -> None:
        """The residuals [m] of an outer step, numbered from 0 (only for `trace`)."""


Proceed = Callable[[int, int], bool]
"""(trajectories finished, outer steps spent) -> False to cancel what is left."""


class Backend(Protocol):
    """One way of running fixed-point problems."""

    name: str

    def why_not(self, model: EquilibriumReasoner, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run the model here, with the remedy; None when it can."""

    def describe(self, model: EquilibriumReasoner, dtype: torch.dtype) -> str:
        """How it would run the model, for `SolveResult.backend_reason`."""

    def fixed_point(
        self, model: EquilibriumReasoner, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed
    ) -> None:
        """Iterates every trajectory to its end and hands each to `recorder`."""
