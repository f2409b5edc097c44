"""The runner of backends that compute in launches, such as those on a GPU.

Trajectories of requests with the same rules share launches of a few outer steps, and their states wait on the device
between them; a launch takes those that have had the least service, as many as the device computes side by side. Rows do
not depend on their company, so each request gets the bits that it would get alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels.backends import Parking
from eqr_kernels.backends.tables import deliver
from eqr_kernels.ops import Tables
from eqr_kernels.run_rules import RULE_FIELDS
from eqr_kernels.scheduler import GOING
from eqr_kernels.serving.runner import Events, Job, StepUpdate
from eqr_kernels.serving.threaded import ThreadedRunner
from eqr_kernels.trajectory import Status


class LaunchingRunner(ThreadedRunner):
    """See `runner.Runner`. Where a job in a launch wants steps, that launch is of one outer step.

    Args:
        max_in_flight: trajectories whose states are kept on the device at most; a puzzle that has more runs alone.
        policy: whose turn it is: "least_service", of the trajectories that have had the fewest outer steps so far, in
            quanta, or "fifo", of the oldest request's until they have ended.
        quantum: outer steps of a trajectory in a launch.
    """

    def __init__(self, events: Events, *, max_in_flight: int, policy: str, quantum: int) -> None:
        self._max_in_flight, self._fifo, self._quantum = max_in_flight, policy == "fifo", quantum
        self._tasks: dict[int, _Task] = {}
        self._batches: list[_Batch] = []
        super().__init__(events)

    @property
    def in_flight(self) -> int:
        return sum(len(batch.going) for batch in [*self._batches])

    def _has_begun(self) -> bool:
        return bool(self._tasks)

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None or self._end(number):
            self._events.done(number, CancelledError())

    def _end(self, number: int) -> bool:
        """Frees what a job holds; False where it has ended before."""
        task = self._tasks.pop(number, None)
        for batch in self._batches:
            batch.leave(number)
        self._forget_empty()
        return task is not None

    def _work(self) -> None:
        self._admit()
        if self._batches:
            self._turn(min(self._batches, key=lambda batch: min(map(self._rank, batch.going))))

    def _rank(self, one: _Trajectory) -> tuple[int, ...]:
        served = 0 if self._fifo else -(-one.steps // self._quantum)
        return served, one.task.job.number, one.puzzle, one.restart

    def _admit(self) -> None:
        """Puts puzzles of jobs in places, oldest first; nobody overtakes one that finds none."""
        while True:
            task = next((task for task in self._tasks.values() if task.waiting), None)
            if task is None:
                if not self._waiting:
                    return
                number, job = self._waiting.popitem(last=False)
                task = self._tasks[number] = _Task(job)
                if not task.waiting:
                    self._events.begun(number)
                    self._finish(task)
                    continue
            try:
                batch = self._batch_for(task)
                if batch is None:
                    return
                batch.begin(task)
            except BaseException as error:  # memory for its states, as a rule
                self._fail([task], error)
                continue
            if not task.waiting:
                self._events.begun(task.job.number)

    def _batch_for(self, task: _Task) -> _Batch | None:
        """A batch with a free place for a puzzle, a new one where there is room for that; None: it must wait."""
        for batch in self._batches:
            if batch.kind == task.kind and batch.free:
                return batch
        breadth = task.job.problem.breadth
        room = self._max_in_flight - sum(batch.trajectories for batch in self._batches)
        if self._batches and room < breadth:
            return None
        # Half of what is left: requests of other rules want some too.
        places = max(1, room // 2 // breadth)
        batch = _Batch(task, min(places, len(task.waiting)) if task.alone else places)
        self._batches.append(batch)
        return batch

    def _turn(self, batch: _Batch) -> None:
        going = sorted(batch.going, key=self._rank)[: batch.width]
        tasks = list({one.task.job.number: one.task for one in going}.values())
        steps = any(task.job.wants_steps for task in tasks)
        try:
            with self._computing():
                standings = batch.launch(going, 1 if steps else self._quantum)
        except BaseException as error:
            self._fail(list({one.task.job.number: one.task for one in batch.going}.values()), error)
            return
        for one, now in zip(going, standings, strict=True):
            self._steps += now.steps - one.steps
            one.steps, one.status = now.steps, now.status
            if one.task.job.wants_steps:
                self._events.step(one.task.job.number, now.update(one))
        self._read()
        for task in tasks:
            if self._tasks.get(task.job.number) is task:
                batch.collect(task)
                if task.complete:
                    self._finish(task)
        self._forget_empty()

    def _forget_empty(self) -> None:
        self._batches = [batch for batch in self._batches if batch.going]

    def _finish(self, task: _Task) -> None:
        error: BaseException | None = None
        try:
            task.deliver()
        except BaseException as raised:
            error = raised
        self._tasks.pop(task.job.number)
        self._events.done(task.job.number, error)

    def _fail(self, tasks: list[_Task], error: BaseException) -> None:
        """Of several it may be one alone: each begins again by itself."""
        for task in tasks:
            self._end(task.job.number)
            if task.alone or len(tasks) == 1:
                self._events.done(task.job.number, error)
            else:
                self._tasks[task.job.number] = _Task(task.job, alone=True)


class _Task:
    """A request that has begun.

    Attributes:
        alone: it shares no launch, for one that it shared has failed.
        kind: equal for those that may share one.
        waiting: puzzles that have no place yet, in their order.
    """

    def __init__(self, job: Job, alone: bool = False) -> None:
        self.job, self.alone = job, alone
        self.kind = job.number if alone else _kind(job)
        self.waiting = deque(range(len(job.problem.tokens)))
        self.ended: dict[int, Tables] = {}  # by puzzles

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.job.problem.tokens)

    def deliver(self) -> None:
        """All that its puzzles came to, to the collector."""
        problem, c = self.job.problem, self.job.solve.model.config
        none = Tables.empty(problem, 0, c.seq_len, c.vocab_size, problem.tokens.device)
        parts = [none, *(self.ended[puzzle] for puzzle in sorted(self.ended))]
        *recorded, logits, residuals = zip(*parts, strict=True)
        fields = [*(torch.cat(table, 1) for table in recorded), torch.cat(logits), torch.cat(residuals)]
        deliver(Tables(*fields), problem, self.job.solve.collector)


def _kind(job: Job) -> object:
    solve, p = job.solve, job.problem
    assert isinstance(solve.backend, Parking)
    rules = (getattr(p, name) for name in RULE_FIELDS if name != "slots")
    return id(solve.model), solve.backend.name, solve.backend.kernel(solve.model, p), p.precision, *rules


@dataclass(eq=False)
class _Trajectory:
    """One in a place: trajectory `row` of the batch's run."""

    task: _Task
    puzzle: int
    restart: int
    row: int
    steps: int = 0
    status: int = GOING


class _Standing(NamedTuple):
    """How a trajectory stands after a launch."""

    steps: int
    status: int
    residual: float
    q_halt: float
    preds: Tensor  # int64 [S], on the CPU

    def update(self, one: _Trajectory) -> StepUpdate:
        fired = self.status in (Status.CONVERGED, Status.HALTED)
        return StepUpdate(one.restart, self.steps, self.preds, self.residual, self.q_halt, one.puzzle, fired)


class _Batch:
    """Requests of one kind, whose trajectories share launches.

    Args:
        task: of that kind.
        places: puzzles at a time.
    """

    def __init__(self, task: _Task, places: int) -> None:
        solve, problem = task.job.solve, task.job.problem
        assert isinstance(solve.backend, Parking)
        self.kind = task.kind
        self.trajectories = places * problem.breadth
        self._breadth = problem.breadth
        self._run = solve.backend.parked_run(solve.model, problem, places)
        self.width = self._run.width
        self._places: dict[int, list[_Trajectory]] = {}
        self.free = list(range(places))

    @property
    def going(self) -> list[_Trajectory]:
        """Trajectories that have not ended."""
        return [one for place in [*self._places.values()] for one in place if one.status == GOING]

    def begin(self, task: _Task) -> None:
        """Puts the next puzzle of a task in a free place."""
        problem, puzzle, place = task.job.problem, task.waiting[0], self.free[-1]
        self._run.begin(place, problem.tokens[puzzle], problem.ids[puzzle])
        task.waiting.popleft()
        self.free.pop()
        first = place * self._breadth
        self._places[place] = [_Trajectory(task, puzzle, i, first + i) for i in range(self._breadth)]

    def launch(self, going: Sequence[_Trajectory], quantum: int) -> list[_Standing]:
        rows = [one.row for one in going]
        self._run.launch(rows, quantum)
        t = self._run.tables
        which = torch.tensor(rows, device=t.steps.device)
        stand = (table[-1, which].cpu() for table in (t.steps, t.status, t.residual, t.q_halt, t.preds))
        steps, status, residual, q_halt, preds = stand
        numbers = (steps.tolist(), status.tolist(), residual.tolist(), q_halt.tolist(), preds)
        return [_Standing(*of_one) for of_one in zip(*numbers, strict=True)]

    def collect(self, task: _Task) -> None:
        """Hands a task its puzzles whose trajectories have all ended, and frees their places."""
        for place, trajectories in [*self._places.items()]:
            if trajectories[0].task is task and all(one.status != GOING for one in trajectories):
                task.ended[trajectories[0].puzzle] = self._run.tables.take(place * self._breadth, self._breadth)
                self._leave(place)

    def leave(self, number: int) -> None:
        """Frees the places of a request."""
        for place, trajectories in [*self._places.items()]:
            if trajectories[0].task.job.number == number:
                self._leave(place)

    def _leave(self, place: int) -> None:
        del self._places[place]
        self.free.append(place)
