"""The runner of backends that can be stepped: one thread that takes requests in turns of a few outer steps.

A request is stepped by itself, with the slots that `solve` would take: its arithmetic, and so its answer, is that of
`solve` alone.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

from eqr_kernels.backends import Snapshot, Stepping
from eqr_kernels.scheduler import Stepper
from eqr_kernels.serving.runner import Events, Job, StepUpdate
from eqr_kernels.serving.threaded import ThreadedRunner
from eqr_kernels.trajectory import settled

POLICIES = ("least_service", "fifo")


class SteppingRunner(ThreadedRunner):
    """See `runner.Runner`.

    Args:
        max_in_flight: trajectories with a state at most, of requests that run beside each other. One that has more in
            flight by itself (`solve` takes 64 at most) runs alone.
        policy: whose turn it is: "least_service", of the request that has had the fewest outer steps so far, or "fifo",
            of the oldest until it has ended.
        quantum: outer steps of a turn, each of all of a request's trajectories in flight; it is cut short for a request
            that begins.
    """

    def __init__(self, events: Events, *, max_in_flight: int, policy: str, quantum: int) -> None:
        self._max_in_flight, self._fifo, self._quantum = max_in_flight, policy == "fifo", quantum
        self._tasks: dict[int, _Task] = {}
        self._admitted = 0  # slots of those in `_tasks`
        super().__init__(events)

    @property
    def in_flight(self) -> int:
        return sum(task.in_flight for task in [*self._tasks.values()])

    def _has_begun(self) -> bool:
        return bool(self._tasks)

    def _work(self) -> None:
        self._admit()
        self._turn(self._next())

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None or self._ended(number):
            self._events.done(number, CancelledError())

    def _drop_all(self) -> list[int]:
        numbers = [*self._tasks]
        self._tasks.clear()
        self._admitted = 0
        return numbers

    def _admit(self) -> None:
        while self._may_begin():
            number, job = self._waiting.popitem(last=False)
            self._tasks[number] = _Task(job, self._events)
            self._admitted += job.problem.slots
            self._events.begun(number)

    def _may_begin(self) -> bool:
        """Whether the first that waits fits beside those that run."""
        if not self._waiting:
            return False
        first = next(iter(self._waiting.values()))
        return not self._tasks or self._admitted + first.problem.slots <= self._max_in_flight

    def _next(self) -> _Task:
        if self._fifo:
            return next(iter(self._tasks.values()))
        # In quanta, rounded up, and of several the one that came first: one whose turn a newcomer cut short must not
        # stand behind all that come later.
        return min(self._tasks.values(), key=lambda task: -(-task.service // self._quantum))

    def _turn(self, task: _Task) -> None:
        number, error = task.job.number, None
        try:
            for _ in range(self._quantum):
                if not self._step(task):
                    break
                self._read()
                if number not in self._tasks or (not self._fifo and self._may_begin()):
                    return  # whoever begins has had the least
            else:
                return
        except BaseException as raised:  # of the request alone: a hook, a callback, memory that it asked for
            error = raised
        if self._ended(number):
            self._events.done(number, error)

    def _step(self, task: _Task) -> bool:
        before = task.service
        try:
            with self._computing():
                return task.step()
        finally:
            self._steps += task.service - before

    def _ended(self, number: int) -> bool:
        task = self._tasks.pop(number, None)
        if task is None:
            return False
        self._admitted -= task.job.problem.slots
        return True


class _Task:
    """A request that has begun.

    Attributes:
        service: outer steps that its trajectories have had.
        in_flight: trajectories that have a state.
    """

    def __init__(self, job: Job, events: Events) -> None:
        self.job, self.events = job, events
        self.service = self.in_flight = 0
        self._stepper: Stepper | None = None

    def step(self) -> bool:
        """An outer step; False: there was none left."""
        solve, problem = self.job.solve, self.job.problem
        if self._stepper is None:
            assert isinstance(solve.backend, Stepping)
            if self.job.wants_steps:
                solve.collector.on_stepped = self._stepped
            self._stepper = solve.backend.stepper(solve.model, problem, solve.collector)
        more = self._stepper.step()
        self.service, self.in_flight = self._stepper.spent, self._stepper.running
        return more and self._stepper.ended < problem.trajectories

    def _stepped(self, rows: Snapshot) -> None:
        numbers, steps, fired = (f.tolist() for f in (rows.number, rows.steps, settled(rows.status)))
        residuals, q_halts = rows.residual.tolist(), rows.q_halt.tolist()
        for i, preds in enumerate(rows.preds.cpu()):
            puzzle, restart = divmod(numbers[i], self.job.problem.breadth)
            update = StepUpdate(restart, steps[i], preds, residuals[i], q_halts[i], puzzle, fired[i])
            self.events.step(self.job.number, update)
