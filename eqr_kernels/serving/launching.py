"""The runner of backends that compute a whole problem in one launch, such as those on a GPU.

A launch takes all that wait and want the same rules: rows do not depend on their company, so each request gets the bits
that it would get alone. Nobody joins a launch that has begun, and one of its requests that is cancelled is only left
out of the answers; it ends early where all of them are.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels.backends import Snapshot
from eqr_kernels.results import Collector, OnFinished
from eqr_kernels.run_rules import RULE_FIELDS
from eqr_kernels.serving.runner import Events, Job, StepUpdate
from eqr_kernels.serving.threaded import ThreadedRunner
from eqr_kernels.trajectory import FinishedTrajectory, Status


class LaunchingRunner(ThreadedRunner):
    """See `runner.Runner`. Of a job that wants steps it tells each trajectory once, at its end.

    Args:
        max_in_flight: trajectories of a launch at most; a request that has more is launched alone.
        policy, quantum: of other runners; a launch takes the oldest that waits, and all that fit it.
    """

    def __init__(self, events: Events, *, max_in_flight: int, policy: str, quantum: int) -> None:
        self._max_in_flight = max_in_flight
        self._launched: dict[int, Job] = {}  # those of the launch under way that are not cancelled
        self._in_flight = 0
        super().__init__(events)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def _has_begun(self) -> bool:
        return bool(self._launched)

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None or self._launched.pop(number, None) is not None:
            self._events.done(number, CancelledError())

    def _work(self) -> None:
        jobs = self._take()
        for job in jobs:
            self._events.begun(job.number)
        self._compute(jobs)

    def _compute(self, jobs: list[Job]) -> None:
        self._launched = {job.number: job for job in jobs}
        error: BaseException | None = None
        try:
            self._launch(jobs)
        except BaseException as raised:
            error = raised
        left, self._launched = self._launched, {}
        if error is not None and len(jobs) > 1:
            # It may be of one of them alone: each by itself then.
            for job in left.values():
                self._compute([job])
            return
        for number in left:
            self._events.done(number, error)

    def _take(self) -> list[Job]:
        """The oldest that waits, and those that can be launched with it."""
        _, first = self._waiting.popitem(last=False)
        jobs, trajectories = [first], first.problem.trajectories
        for number, job in [*self._waiting.items()]:
            more = job.problem.trajectories
            if _kind(job) == _kind(first) and trajectories + more <= self._max_in_flight:
                del self._waiting[number]
                jobs.append(job)
                trajectories += more
        return jobs

    def _launch(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.wants_steps:
                job.solve.collector.on_finished = _teller(job, self._events)
        solve, problem = jobs[0].solve, jobs[0].problem
        if len(jobs) > 1:
            tokens, ids = (torch.cat([getattr(job.problem, name) for job in jobs]) for name in ("tokens", "ids"))
            problem = replace(problem, tokens=tokens, ids=ids, slots=sum(job.problem.slots for job in jobs))
        spent = 0

        def proceed(ended: int, now_spent: int) -> bool:
            nonlocal spent
            self._steps, spent = self._steps + now_spent - spent, now_spent
            self._in_flight = min(problem.slots, problem.trajectories - ended)
            self._read()
            return bool(self._launched)

        try:
            with self._computing():
                solve.backend.fixed_point(solve.model, problem, _Shares(jobs), proceed)
        finally:
            self._in_flight = 0


def _kind(job: Job) -> object:
    """Equal for jobs that one launch can take."""
    if job.problem.start is not None:
        return job.number
    solve, p = job.solve, job.problem
    rules = (getattr(p, name) for name in RULE_FIELDS if name != "slots")
    return id(solve.model), solve.backend.name, p.precision, p.keep_states, *rules


class _Share(NamedTuple):
    """What of a launch is a request's."""

    collector: Collector
    puzzles: slice
    trajectories: slice


class _Shares:
    """The recorder of a launch, which hands each request its own."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._shares: list[_Share] = []
        n = 0
        for job in jobs:
            rows, b = len(job.problem.tokens), job.problem.breadth
            self._shares.append(_Share(job.solve.collector, slice(n, n + rows), slice(n * b, (n + rows) * b)))
            n += rows

    def ended(self, trajectory: FinishedTrajectory) -> None:
        """Each is told when all have ended."""

    def stepped(self, rows: Snapshot) -> None:
        """There are none."""

    def finished(self, rows: Snapshot) -> None:
        for share, its in self._split(rows):
            share.collector.finished(its)

    def checkpoint(self, depth: int, rows: Snapshot) -> None:
        for share, its in self._split(rows):
            share.collector.checkpoint(depth, its)

    def residual(self, number: Tensor, step: Tensor, residual: Tensor) -> None:
        """number [m, 1], step [depth], residual [m, depth]."""
        for share in self._shares:
            its = _within(number[:, 0], share.trajectories)
            share.collector.residual(number[its] - share.trajectories.start, step, residual[its])

    def winners(self, restart: Tensor, logits: Tensor, states: tuple[Tensor, Tensor] | None = None) -> None:
        for share in self._shares:
            at = share.puzzles
            its = None if states is None else (states[0][at].clone(), states[1][at].clone())
            share.collector.winners(restart[at], logits[at].clone(), its)

    def note(self, text: str) -> None:
        for share in self._shares:
            share.collector.note(text)

    def _split(self, rows: Snapshot) -> Iterable[tuple[_Share, Snapshot]]:
        for share in self._shares:
            its = rows.take(_within(rows.number, share.trajectories))
            yield share, its._replace(number=its.number - share.trajectories.start)


def _within(number: Tensor, which: slice) -> Tensor:
    return (number >= which.start) & (number < which.stop)


def _teller(job: Job, events: Events) -> OnFinished:
    def tell(t: FinishedTrajectory) -> None:
        if t.steps:
            fired = t.status in (Status.CONVERGED, Status.HALTED)
            update = StepUpdate(t.restart, t.steps, t.preds, t.residual, t.q_halt, t.puzzle, fired)
            events.step(job.number, update)

    return tell
