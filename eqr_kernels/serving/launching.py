"""The runner of backends that compute in launches, such as those on a GPU.

Trajectories of requests with the same rules share launches of a few outer steps, and their states wait on the device
between them; a launch takes those that have had the least service, as many as the device computes side by side.
Requests of different rules take turns. Rows do not depend on their company, so each request gets the bits that it would
get alone.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

import torch

from eqr_kernels.serving.batch import Batch, Standing, Task, Trajectory
from eqr_kernels.serving.runner import Events
from eqr_kernels.serving.threaded import ThreadedRunner


class LaunchingRunner(ThreadedRunner):
    """See `runner.Runner`. A job is cancelled when the launch that it is in has ended.

    Args:
        max_in_flight: trajectories whose states are kept on the device at most; a puzzle that has more runs alone.
        policy: whose turn it is: "least_service", of the trajectories that have had the fewest outer steps so far, in
            quanta, or "fifo", of the oldest request's until they have ended.
        quantum: outer steps of a trajectory in a launch; of a launch that has a job that wants steps, it is one.
    """

    def __init__(self, events: Events, *, max_in_flight: int, policy: str, quantum: int) -> None:
        self._max_in_flight, self._fifo, self._quantum = max_in_flight, policy == "fifo", quantum
        self._tasks: dict[int, Task] = {}
        self._batches: dict[object, Batch] = {}  # by the kinds of tasks
        self._clock = 0  # the latest of the batches that were launched
        super().__init__(events)

    @property
    def in_flight(self) -> int:
        return sum(len(batch.going) for batch in [*self._batches.values()])

    def _has_begun(self) -> bool:
        return bool(self._tasks)

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None or self._end(number):
            self._events.done(number, CancelledError())

    def _drop_all(self) -> list[int]:
        numbers = [*self._tasks]
        self._tasks.clear()
        self._batches.clear()
        return numbers

    def _end(self, number: int) -> bool:
        """Frees what a job holds; False where it has ended before."""
        task = self._tasks.pop(number, None)
        if task is not None and task.kind in self._batches:
            self._batches[task.kind].leave(number)
            self._forget_if_empty(task.kind)
        return task is not None

    def _forget_if_empty(self, kind: object) -> None:
        if kind in self._batches and not self._batches[kind].occupied:
            del self._batches[kind]

    def _work(self) -> None:
        self._admit()
        if self._batches:
            self._turn(min(self._batches.values(), key=self._order))

    def _order(self, batch: Batch) -> tuple[object, ...]:
        first = min(map(self._rank, batch.going))
        return first if self._fifo else (batch.clock, *first)

    def _rank(self, one: Trajectory) -> tuple[int, ...]:
        number, index = one.task.job.number, one.puzzle * one.task.job.problem.breadth + one.restart
        # Of equals the first of each request, then the second of each: one of many puzzles is no more than others.
        return (number, index) if self._fifo else (-(-one.steps // self._quantum), index, number)

    def _admit(self) -> None:
        """Puts puzzles in places while there is room: of the job that has had the fewest, and the oldest of equals."""
        while (task := self._next_task()) is not None:
            breadth = task.job.problem.breadth
            occupied = sum(batch.occupied for batch in self._batches.values())
            if occupied and occupied + breadth > self._max_in_flight:
                return
            try:
                if task.kind not in self._batches:
                    room = (self._max_in_flight - occupied) // breadth
                    self._batches[task.kind] = Batch(task, max(1, min(len(task.waiting), room)), self._clock)
                self._batches[task.kind].begin(task)
            except torch.OutOfMemoryError as error:
                self._forget_if_empty(task.kind)
                if occupied:
                    return  # until others have ended
                self._fail([task], error)
            except BaseException as error:
                self._fail([task], error)
            else:
                if not task.waiting:
                    self._events.begun(task.job.number)

    def _next_task(self) -> Task | None:
        while self._waiting:
            number, job = self._waiting.popitem(last=False)
            try:
                self._tasks[number] = Task(job)
            except BaseException as error:
                self._events.done(number, error)
        waiting = (task for task in self._tasks.values() if task.waiting)
        return min(waiting, key=lambda task: (0 if self._fifo else task.begun, task.job.number), default=None)

    def _turn(self, batch: Batch) -> None:
        going = sorted(batch.going, key=self._rank)[: batch.width]
        tasks = list({one.task.job.number: one.task for one in going}.values())
        steps = any(task.job.wants_steps for task in tasks)
        batch.clock += 1
        self._clock = max(self._clock, batch.clock)
        try:
            with self._computing():
                depth = going[0].task.job.problem.depth
                standings = batch.launch(going, 1 if steps else min(self._quantum, depth), preds=steps)
            for one, now in zip(going, standings, strict=True):
                self._stepped(one, now)
            self._read()
            for task in tasks:
                if self._tasks.get(task.job.number) is task:
                    batch.collect(task)
        except BaseException as error:
            self._fail(list({one.task.job.number: one.task for one in batch.going + going}.values()), error)
            return
        for task in tasks:
            if self._tasks.get(task.job.number) is task and task.complete:
                self._finish(task)
        self._forget_if_empty(tasks[0].kind)

    def _stepped(self, one: Trajectory, now: Standing) -> None:
        new, task = now.steps - one.steps, one.task
        self._steps += new
        one.steps, one.status = now.steps, now.status
        which = one.puzzle, one.restart
        # One that was given up before it took a step has nothing new, nor has one that is computed again.
        if task.job.wants_steps and new and now.steps > task.reported.get(which, 0):
            task.reported[which] = now.steps
            self._events.step(task.job.number, now.update(one))

    def _finish(self, task: Task) -> None:
        error: BaseException | None = None
        try:
            task.deliver()
        except BaseException as raised:
            error = raised
        self._tasks.pop(task.job.number)
        self._events.done(task.job.number, error)

    def _fail(self, tasks: list[Task], error: BaseException) -> None:
        """Of several it may be one alone: each begins again by itself."""
        for task in tasks:
            if self._tasks.get(task.job.number) is not task:
                continue
            self._end(task.job.number)
            if task.alone or len(tasks) == 1:
                self._events.done(task.job.number, error)
            else:
                self._tasks[task.job.number] = Task(task.job, before=task)
