"""What an engine asks of whatever computes for it, and what it is told."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from eqr_kernels.backends import FixedPointProblem
from eqr_kernels.solver import PreparedSolve


class StepUpdate(NamedTuple):
    """A trajectory after an outer step."""

    restart: int
    step: int
    """Outer steps done."""
    preds: Tensor
    """int64 [S], on the CPU."""
    residual: float
    q_halt: float
    puzzle: int = 0
    """Row of the request's tokens."""
    settled: bool = False
    """The halting rule fired: this is its last update."""


class Job(NamedTuple):
    """A request as it is computed.

    Attributes:
        number: of the request, unique in an engine; lower ones came first.
        solve: what to compute, and the collector for what comes out. Its model is a copy that nobody changes, the same
            for all jobs until the weights change; or the engine's own, where that was modified.
        deadline: `time.monotonic()` at which the engine answers and cancels it, or None.
        wants_steps: `Events.step` is to be called.
    """

    number: int
    solve: PreparedSolve
    deadline: float | None = None
    wants_steps: bool = False

    @property
    def problem(self) -> FixedPointProblem:
        return self.solve.problem


class RunnerStats(NamedTuple):
    """Counts since the start of a runner.

    Attributes:
        in_flight: trajectories that have a state now.
        steps: outer steps spent, of all trajectories.
        busy_seconds: that its workers have computed, all together. workers: their number.
    """

    in_flight: int
    steps: int
    busy_seconds: float
    workers: int


class Events(Protocol):
    """What a runner tells its engine, from threads of its own. Nothing is raised here."""

    def begun(self, number: int) -> None:
        """A request waits no longer: the next may take its place in the queue."""

    def step(self, number: int, update: StepUpdate) -> None:
        """Of a job that wants steps, each trajectory after each outer step."""

    def done(self, number: int, error: BaseException | None) -> None:
        """A request holds nothing any more: its collector has all, or it failed; once each, cancelled ones too."""


class Runner(Protocol):
    """Computes jobs in threads of its own, several at a time. All methods may be called from any thread."""

    def start(self, job: Job) -> None:
        """Takes a job.

        Raises:
            EngineClosed: after `close`.
        """

    def cancel(self, number: int) -> None:
        """Ends a job at its next outer step; nothing where it has ended."""

    def stats(self) -> RunnerStats: ...

    def close(self, timeout: float | None = None) -> None:
        """Takes no more jobs, and lets those that it has run to their ends.

        Returns when its threads have ended, or after `timeout` seconds. With timeout=0 it takes no lock that a garbage
        collector could meet.
        """
