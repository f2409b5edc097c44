"""Trajectories of requests with the same rules, which share launches on a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels.backends import Parking
from eqr_kernels.backends.tables import deliver
from eqr_kernels.ops import Tables
from eqr_kernels.run_rules import RULE_FIELDS
from eqr_kernels.scheduler import GOING
from eqr_kernels.serving.runner import Job, StepUpdate
from eqr_kernels.trajectory import SETTLED


class Task:
    """A request that computes in launches.

    Args:
        before: what was known of it when a launch that it shared failed: it goes on by itself, from its start.

    Attributes:
        kind: equal for those that may share launches.
        waiting: puzzles that have no place yet, in their order.
        begun: how many have had one.
        reported: the last outer step of (puzzle, restart) that its caller knows.
    """

    def __init__(self, job: Job, before: Task | None = None) -> None:
        self.job, self.alone = job, before is not None
        self.kind = job.number if self.alone else _kind(job)
        self.waiting = deque(range(len(job.problem.tokens)))
        self.begun = 0
        self.reported: dict[tuple[int, int], int] = {} if before is None else before.reported
        self.ended: dict[int, Tables] = {}  # by puzzles

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.job.problem.tokens)

    def deliver(self) -> None:
        """All that its puzzles came to, to the collector."""
        *recorded, logits, residuals = zip(*(self.ended[puzzle] for puzzle in sorted(self.ended)), strict=True)
        fields = [*(torch.cat(table, 1) for table in recorded), torch.cat(logits), torch.cat(residuals)]
        deliver(Tables(*fields), self.job.problem, self.job.solve.collector)


def _kind(job: Job) -> object:
    solve, p = job.solve, job.problem
    assert isinstance(solve.backend, Parking)
    rules = (getattr(p, name) for name in RULE_FIELDS if name != "slots")
    return id(solve.model), solve.backend.name, solve.backend.kernel(solve.model, p), p.precision, *rules


@dataclass(eq=False)
class Trajectory:
    """One in a place: number `row` of the batch's run."""

    task: Task
    puzzle: int
    restart: int
    row: int
    steps: int = 0
    status: int = GOING


class Standing(NamedTuple):
    """How a trajectory stands after a launch."""

    steps: int
    status: int
    residual: float
    q_halt: float
    preds: Tensor | None  # int64 [S], on the CPU, where it was asked for

    def update(self, one: Trajectory) -> StepUpdate:
        assert self.preds is not None
        fired = self.status in SETTLED
        return StepUpdate(one.restart, self.steps, self.preds, self.residual, self.q_halt, one.puzzle, fired)


class Batch:
    """Requests of one kind.

    Args:
        task: of that kind.
        places: for so many puzzles at first, at least 1; there are more when they are wanted.

    Attributes:
        width: trajectories that the device computes side by side.
        clock: launches that it has had, counted on from where the others were when it began.
    """

    def __init__(self, task: Task, places: int, clock: int) -> None:
        solve, problem = task.job.solve, task.job.problem
        assert isinstance(solve.backend, Parking)
        self.clock = clock
        self._breadth = problem.breadth
        self._run = solve.backend.parked_run(solve.model, problem, places)
        self.width = self._run.width
        self._places: dict[int, list[Trajectory]] = {}
        self._free = list(range(places))

    @property
    def going(self) -> list[Trajectory]:
        """Trajectories that have not ended."""
        return [one for place in [*self._places.values()] for one in place if one.status == GOING]

    @property
    def occupied(self) -> int:
        """Trajectories in places, ended ones of a puzzle that goes on included."""
        return len(self._places) * self._breadth

    def begin(self, task: Task) -> None:
        """Puts the next puzzle of a task in a place."""
        if not self._free:
            places = len(self._places)
            self._run.grow(2 * places)
            self._free = list(range(places, 2 * places))
        problem, puzzle, place = task.job.problem, task.waiting[0], self._free[-1]
        self._run.begin(place, problem.tokens[puzzle], problem.ids[puzzle])
        task.waiting.popleft()
        task.begun += 1
        self._free.pop()
        first = place * self._breadth
        self._places[place] = [Trajectory(task, puzzle, i, first + i) for i in range(self._breadth)]

    def launch(self, going: Sequence[Trajectory], quantum: int, preds: bool) -> list[Standing]:
        """Args: preds: whether answers are wanted too."""
        rows = [one.row for one in going]
        self._run.launch(rows, quantum)
        t = self._run.tables
        which = torch.tensor(rows, device=t.steps.device)
        numbers = [table[-1, which].tolist() for table in (t.steps, t.status, t.residual, t.q_halt)]
        answers = t.preds[-1, which].cpu() if preds else [None] * len(rows)
        return [Standing(*of_one) for of_one in zip(*numbers, answers, strict=True)]

    def collect(self, task: Task) -> None:
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
        self._free.append(place)
