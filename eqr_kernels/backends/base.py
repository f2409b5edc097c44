"""What a backend is given and what it gives back: the fixed-point problem and its finished trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from eqr_kernels.modules import EqROperator
from eqr_kernels.ops import StartStates, Tables, TurnCells
from eqr_kernels.precision import Precision
from eqr_kernels.run_rules import RunRules
from eqr_kernels.scheduler import Proceed, Stepper
from eqr_kernels.trajectory import FinishedTrajectory, Snapshot


@dataclass(frozen=True, kw_only=True)
class FixedPointProblem(RunRules):
    """N puzzles x B trajectories to iterate by the rules; checked by `solve`, so that a backend need not.

    Trajectory t belongs to puzzle t // breadth and has restart t % breadth.
    """

    tokens: Tensor  # int64 [N, S] on the model's device
    ids: Tensor  # int64 [N], key the random stream
    precision: Precision
    slots_asked: bool = True  # else `slots` is a default, and a backend may have a better one
    start: StartStates | None = None  # of all trajectories, float64 where the run is; None: each draws its own
    keep_states: bool = False  # of the winners
    turns: TurnCells | None = None  # on the model's device, and not with `keep_states`; None: cells stay
    report_ends: bool = False  # `Recorder.ended` wants each trajectory soon after its end
    report_steps: bool = False  # `Recorder.stepped` wants every outer step

    @property
    def trajectories(self) -> int:
        return self.tokens.shape[0] * self.breadth

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype


class Recorder(Protocol):
    """Takes the results, as they come or all at once."""

    def ended(self, trajectory: FinishedTrajectory) -> None:
        """One that has ended, from a backend that can tell so before it gives it to `finished`."""

    def stepped(self, rows: Snapshot) -> None:
        """Trajectories after an outer step, their status `scheduler.GOING` where they go on: of a stepper, with
        `report_steps`, before those that have ended are given to `finished`."""

    def finished(self, rows: Snapshot) -> None:
        """Trajectories that have ended; each is given once."""

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        """Trajectories at a checkpoint; those that ended earlier are given as they ended."""

    def residual(self, number: Tensor, step: Tensor, residual: Tensor) -> None:
        """Residuals [m] of outer steps numbered from 0 (only for `trace`); or any shapes that broadcast."""

    def winners(self, restart: Tensor, logits: Tensor, states: tuple[Tensor, Tensor] | None = None) -> None:
        """The restart [N] that `select` chooses for each puzzle, its logits float32 [N, S, V] and, with `keep_states`,
        its z_H and z_L, float32 [N, S, d].

        From a backend that hands over trajectories without their logits, and from no other.
        """

    def note(self, text: str) -> None:
        """Something about this run that `SolveResult.backend_reason` must tell, such as a fallback."""


class Backend(Protocol):
    """One way of running fixed-point problems."""

    name: str
    max_checkpoints: int | None
    """How many depths it records in one run at most; None: any number."""
    keeps_states: bool
    """Whether it takes start states and gives final ones."""
    turns_cells: bool
    """Whether it moves cells and states between outer steps, see `ops.TurnCells`."""
    runs_modules: bool
    """Whether it runs a model through its modules where these are not those of the plain operator any more, see
    `modifications`; the other backends are given no such model."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that it computes in, for the models that it can run."""

    def why_not(self, model: EqROperator, precision: Precision) -> str | None:
        """Why this backend cannot run the model here, with the remedy; None when it can."""

    def describe(self, model: EqROperator, precision: Precision) -> str:
        """How it would run the model, for `SolveResult.backend_reason`."""

    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        """Iterates every trajectory to its end and hands each to `recorder`."""


@runtime_checkable
class Stepping(Protocol):
    """A backend whose runs can be taken in turns."""

    def stepper(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder) -> Stepper:
        """`fixed_point`, an outer step at a time, in any thread: the arithmetic is the same, bit for bit."""


class ParkedRun(Protocol):
    """Places for P puzzles of B trajectories each, whose states stay on the device between launches.

    Trajectory t is restart t % B of the puzzle at place t // B.

    Attributes:
        width: trajectories that the device computes side by side.
        tables: how each stands after the last launch that it was in, its status `scheduler.GOING` where it goes on.
    """

    width: int
    tables: Tables

    def grow(self, places: int) -> None:
        """To so many places; what is in those that there are stays."""

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        """Puts a puzzle in a place: tokens int64 [S], ident int64 [], the key of its random streams."""

    def launch(self, rows: Sequence[int], quantum: int) -> None:
        """Iterates trajectories that go on, each for at most `quantum` outer steps; returns when that is done."""


@runtime_checkable
class Parking(Protocol):
    """A backend whose trajectories can wait on the device between launches."""

    def parked_run(self, model: EqROperator, problem: FixedPointProblem, places: int) -> ParkedRun:
        """For puzzles of the problem's rules; of its tokens only the length matters.

        Its trajectories get the bits that `fixed_point` gives them, in any quanta and any company.
        """

    def kernel(self, model: EqROperator, problem: FixedPointProblem) -> str:
        """What computes the problem; problems of one run must have the same."""


@cache
def gpu_is_seen() -> bool:
    """Whether torch sees a GPU; it is asked once, for asking takes longer than a small solve."""
    return torch.cuda.device_count() > 0


def gpu_remedy() -> str:
    """What to do about a model that is not on a GPU, for a backend that needs one."""
    if gpu_is_seen():
        return "move the model with model.cuda()"
    return f"torch {torch.__version__} sees no GPU here, so use backend='auto'"
