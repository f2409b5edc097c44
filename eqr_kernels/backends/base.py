"""What a backend is given and what it gives back: the fixed-point problem and its finished trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eqr_kernels.modules import EqROperator
from eqr_kernels.trajectory import Snapshot


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
    select: str  # which trajectory is the answer: "residual", "vote", "q" or "first"
    checkpoints: tuple[int, ...]
    slots: int  # trajectories in flight at most
    trace: bool
    dtype: torch.dtype  # of the arithmetic; int8: the channel GEMMs in int8, the rest as in bfloat16
    slots_asked: bool = True  # else `slots` is a default, and a backend may have a better one

    @property
    def trajectories(self) -> int:
        return self.tokens.shape[0] * self.breadth

    @property
    def race(self) -> bool:
        """Siblings that cannot be the first to halt may be cancelled."""
        return self.select == "first"


class Recorder(Protocol):
    """Takes the results, as they come or all at once."""

    def finished(self, rows: Snapshot) -> None:
        """Trajectories that have ended; each is given once."""

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        """Trajectories at a checkpoint; those that ended earlier are given as they ended."""

    def residual(self, number: Tensor, step: Tensor, residual: Tensor) -> None:
        """Residuals [m] of outer steps numbered from 0 (only for `trace`); or any shapes that broadcast."""

    def winners(self, restart: Tensor, logits: Tensor) -> None:
        """The restart [N] that `select` chooses for each puzzle and its logits, float32 [N, S, V].

        From a backend that hands over trajectories without their logits, and from no other.
        """

    def note(self, text: str) -> None:
        """Something about this run that `SolveResult.backend_reason` must tell, such as a fallback."""


Proceed = Callable[[int, int], bool]
"""(trajectories finished, outer steps spent) -> False to cancel what is left. Called at the beginning, now and then (by
the reference at every step), and with the final numbers at the end."""


class Backend(Protocol):
    """One way of running fixed-point problems."""

    name: str

    def why_not(self, model: EqROperator, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run the model here, with the remedy; None when it can."""

    def describe(self, model: EqROperator, dtype: torch.dtype) -> str:
        """How it would run the model, for `SolveResult.backend_reason`."""

    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        """Iterates every trajectory to its end and hands each to `recorder`."""
