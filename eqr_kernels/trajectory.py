"""What is known of trajectories: how each ended, and where it was at some depth."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor


class Status(IntEnum):
    """How a trajectory ended."""

    CONVERGED = 0
    """Its residual was at most tol for `patience` consecutive outer steps (halt="residual+q": and q_halt positive)."""
    HALTED = 1
    """q_halt was positive (halt="q", or "residual|q" where the residual was not low enough at that step)."""
    MAX_DEPTH = 2
    """It spent the whole depth."""
    CANCELLED = 3
    """It could no longer win its race, or the caller stopped the solve."""
    DIVERGED = 4
    """Its state or its logits became non-finite; logits and preds are the last finite ones."""


SETTLED = (Status.CONVERGED, Status.HALTED)
"""Those of trajectories whose halting rule fired."""


def settled(status: Tensor) -> Tensor:
    """bool, any shape: the halting rule fired, see `SETTLED`."""
    converged, halted = SETTLED
    return (status == converged) | (status == halted)


class FinishedTrajectory(NamedTuple):
    """One trajectory that has ended, as `solve` tells it to `on_finished`."""

    puzzle: int  # row of the tokens
    restart: int
    status: Status
    steps: int
    residual: float
    score: float
    q_halt: float
    preds: Tensor  # int64 [S], on the CPU


class Snapshot(NamedTuple):
    """m trajectories at some depth. Scores and residuals are float32."""

    number: Tensor  # int64 [m], of the trajectories
    preds: Tensor  # int64 [m, S]
    logits: Tensor | None  # float32 [m, S, V]; None where the backend itself keeps the winners'
    q_halt: Tensor  # float32 [m]
    residual: Tensor  # [m]
    score: Tensor  # [m]
    steps: Tensor  # int64 [m]
    status: Tensor  # int64 [m]
    z_H: Tensor | None = None  # float32 [m, S, d]; None where states are not kept, or as with the logits
    z_L: Tensor | None = None

    def take(self, rows: Tensor) -> Snapshot:
        """Those of `rows`, a mask bool [m] or indices."""
        fields: list[Any] = [None if field is None else field[rows] for field in self]
        return Snapshot(*fields)
