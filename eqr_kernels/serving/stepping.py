"""The runner in Python: one thread that takes requests in turns of a few outer steps.

A request is stepped by itself, with the slots that `solve` would take: its arithmetic, and so its answer, is that of
`solve` alone. Backends that cannot be stepped compute a request in one launch, from its first turn to its end; no other
request has a turn meanwhile, and a cancelled one ends where the launch asks next.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError
from queue import SimpleQueue

from eqr_kernels.backends import Snapshot, Stepping
from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.scheduler import Stepper
from eqr_kernels.serving.errors import EngineClosed
from eqr_kernels.serving.runner import Events, Job, RunnerStats, StepUpdate
from eqr_kernels.trajectory import FinishedTrajectory, Status, settled

POLICIES = ("least_service", "fifo")


class SteppingRunner:
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
        self._events, self._max_in_flight, self._fifo, self._quantum = events, max_in_flight, policy == "fifo", quantum
        # All else belongs to the thread, which learns by these messages: a queue that a finalizer may put into.
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._open = fork_safe_lock()  # held where a job is put, so that none comes behind the end
        self._closing = False
        self._waiting: OrderedDict[int, Job] = OrderedDict()
        self._tasks: dict[int, _Task] = {}
        self._admitted = 0  # slots of those in `_tasks`
        self._steps, self._busy, self._busy_since = 0, 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="eqr-engine", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        with self._open:
            if self._closing:
                raise EngineClosed("the engine was closed while the request was prepared")
            self._inbox.put(lambda: self._waiting.update({job.number: job}))

    def cancel(self, number: int) -> None:
        self._inbox.put(lambda: self._drop(number))

    def stats(self) -> RunnerStats:
        busy, since = self._busy, self._busy_since
        if since:
            busy += time.perf_counter() - since
        return RunnerStats(sum(t.in_flight for t in list(self._tasks.values())), self._steps, busy, 1)

    def close(self, timeout: float | None = None) -> None:
        if timeout == 0:
            self._inbox.put(self._close)
            return
        with self._open:
            self._inbox.put(self._close)
            self._closing = True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _close(self) -> None:
        self._closing = True

    # The thread.

    def _run(self) -> None:
        while True:
            self._read(wait=not (self._waiting or self._tasks))
            if not (self._waiting or self._tasks):
                if self._closing and self._inbox.empty():
                    return
                continue
            self._admit()
            self._turn(self._next())

    def _read(self, wait: bool = False) -> None:
        """Does what the messages say."""
        wait = wait and not self._closing
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None or self._ended(number):
            self._events.done(number, CancelledError())

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
        return min(self._tasks.values(), key=lambda task: task.service)  # of several the one that came first

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
        self._busy_since = time.perf_counter()
        try:
            return task.step(self._proceed)
        finally:
            self._count(task)
            self._busy, self._busy_since = self._busy + time.perf_counter() - self._busy_since, 0.0

    def _count(self, task: _Task) -> None:
        self._steps, task.counted = self._steps + task.service - task.counted, task.service

    def _proceed(self, task: _Task) -> bool:
        self._count(task)
        self._read()
        return task.job.number in self._tasks

    def _ended(self, number: int) -> bool:
        task = self._tasks.pop(number, None)
        if task is None:
            return False
        self._admitted -= task.job.problem.slots
        return True


class _Task:
    """A request that has begun.

    Attributes:
        service: outer steps that its trajectories have had. counted: those that the runner knows of.
        in_flight: trajectories that have a state.
    """

    def __init__(self, job: Job, events: Events) -> None:
        self.job, self.events = job, events
        self._stepping = job.solve.backend if isinstance(job.solve.backend, Stepping) else None
        self.service = self.counted = self.in_flight = 0
        self._stepper: Stepper | None = None

    def step(self, proceed: Callable[[_Task], bool]) -> bool:
        """An outer step, or all of them by a backend that cannot be stepped; False: there was none left."""
        solve, problem = self.job.solve, self.job.problem
        if self._stepping is None:
            self._launch(proceed)
            return False
        if self._stepper is None:
            if self.job.wants_steps:
                solve.collector.on_stepped = self._stepped
            self._stepper = self._stepping.stepper(solve.model, problem, solve.collector)
        more = self._stepper.step()
        self.service, self.in_flight = self._stepper.spent, self._stepper.running
        return more and self._stepper.ended < problem.trajectories

    def _launch(self, proceed: Callable[[_Task], bool]) -> None:
        solve, problem = self.job.solve, self.job.problem
        if self.job.wants_steps:
            solve.collector.on_finished = self._finished

        def ask(ended: int, spent: int) -> bool:
            self.service, self.in_flight = spent, min(problem.slots, problem.trajectories - ended)
            return proceed(self)

        solve.backend.fixed_point(solve.model, problem, solve.collector, ask)
        self.in_flight = 0

    def _stepped(self, rows: Snapshot) -> None:
        numbers, steps, fired = (f.tolist() for f in (rows.number, rows.steps, settled(rows.status)))
        residuals, q_halts = rows.residual.tolist(), rows.q_halt.tolist()
        for i, preds in enumerate(rows.preds.cpu()):
            puzzle, restart = divmod(numbers[i], self.job.problem.breadth)
            update = StepUpdate(restart, steps[i], preds, residuals[i], q_halts[i], puzzle, fired[i])
            self.events.step(self.job.number, update)

    def _finished(self, t: FinishedTrajectory) -> None:
        if t.steps:
            fired = t.status in (Status.CONVERGED, Status.HALTED)
            update = StepUpdate(t.restart, t.steps, t.preds, t.residual, t.q_halt, t.puzzle, fired)
            self.events.step(self.job.number, update)
