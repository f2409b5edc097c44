"""The requests of an engine: those that are not answered yet, and how each is answered once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from itertools import count
from weakref import WeakSet, ref

import torch

from eqr_kernels.forking import fork_safe_rlock
from eqr_kernels.results import SolveResult
from eqr_kernels.serving.deadlines import call_at
from eqr_kernels.serving.errors import DeadlineExceeded, EngineClosed, QueueFull
from eqr_kernels.serving.runner import Job, Runner, StepUpdate
from eqr_kernels.trajectory import Status

OnStep = Callable[[StepUpdate], object]

_log = logging.getLogger(__name__)
_answers: WeakSet[Answer] = WeakSet()


class Answer(Future[SolveResult]):
    """The future of a request. `cancel` stops it, unless it has ended."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        super().__init__()
        self._stop = stop
        _answers.add(self)

    def cancel(self) -> bool:
        return self._stop() or self.cancelled()

    def end_cancelled(self) -> None:
        if super().cancel():
            self.set_running_or_notify_cancel()  # else `concurrent.futures.wait` would not see it

    def leave_to_parent(self, error: BaseException) -> None:
        """In a forked child, where another thread may have held the lock at the fork: nobody calls back there."""
        self._condition = threading.Condition()
        if not self.done():
            self._exception, self._state = error, "FINISHED"


class Request:
    """One that is not answered yet."""

    def __init__(self, job: Job, answer: Answer, runner: Runner, on_step: OnStep | None) -> None:
        self.job, self.answer, self.runner, self.on_step = job, answer, runner, on_step
        self.queued = True


class Requests:
    """All that wait or run, by number. It is what the runners tell, see `runner.Events`.

    Whoever takes a request out of it answers it, so that each is answered once. No lock is held while a future calls
    back, nor while a step's callback runs.

    Attributes:
        runners: by kind, made when they are first needed.
        why_closed: "" while it is open.
        in_child: this is a forked child, which has none of the runners' threads.
    """

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self.numbers = count()
        self.counts: Counter[str] = Counter()
        self.histogram: Counter[int] = Counter()
        self.runners: dict[str, Runner] = {}
        self.why_closed, self.in_child = "", False
        self._changed = threading.Condition(fork_safe_rlock())
        self._open: dict[int, Request] = {}
        self._queued = 0
        self._room: list[Callable[[], object]] = []
        self._tellers: set[int] = set()  # threads that make room, and so must not wait for it

    def answer(self, number: int) -> Answer:
        return Answer(partial(self.cancel, number))

    def check_open(self) -> None:
        """Raises:
        EngineClosed: it is not.
        """
        if self.why_closed:
            raise EngineClosed(self.why_closed)

    def runner(self, kind: str, make: Callable[[], Runner]) -> Runner:
        """That of a kind; none is made behind `close`, which would not end it."""
        with self._changed:
            self.check_open()
            if kind not in self.runners:
                self.runners[kind] = make()
            return self.runners[kind]

    def enter(self, request: Request, *, wait: bool, until: float | None = None) -> None:
        """Puts a request in the queue, its deadline included, and starts it.

        Args:
            wait: for room, until `time.monotonic() == until`, and no longer than to the deadline.

        Raises:
            QueueFull, EngineClosed, DeadlineExceeded.
        """
        job = request.job
        if not job.problem.trajectories:
            self.check_open()
            with self._changed:
                self.counts.update(submitted=1, completed=1)
            request.answer.set_result(job.solve.result())
            return
        wait = wait and threading.get_ident() not in self._tellers
        with self._changed:
            while True:
                self.check_open()
                if self._queued < self.max_queued:
                    break
                now = time.monotonic()
                if job.deadline is not None and now >= job.deadline:
                    raise DeadlineExceeded("the deadline passed while the request waited for room in the queue")
                if not wait or (until is not None and now >= until):
                    raise QueueFull(
                        f"{self._queued} requests wait, and max_queued={self.max_queued} may; try again later, or "
                        "submit with block=True"
                    )
                limits = [limit - now for limit in (until, job.deadline) if limit is not None]
                self._changed.wait(min([*limits, threading.TIMEOUT_MAX]))
            self._open[job.number] = request
            self._queued += 1
            self.counts["submitted"] += 1
        try:
            request.runner.start(job)
        except BaseException:
            if self._take(job.number) is not None:
                with self._changed:
                    self.counts["submitted"] -= 1
            request.runner.cancel(job.number)  # Ctrl-C may have come when it had started
            raise
        if job.number not in self._open:
            request.runner.cancel(job.number)  # again, where that was before it had started
        if job.deadline is not None:
            call_at(job.deadline, partial(_expire, ref(self), job.number))

    def when_room(self, function: Callable[[], object]) -> None:
        """Calls `function` once, as soon as the queue may have room: from any thread, this one included."""
        with self._changed:
            if self._queued >= self.max_queued and not self.why_closed:
                self._room.append(function)
                return
        function()

    def _take(self, number: int, outcome: str = "") -> Request | None:
        """A request out of the table, for whoever answers it; None where somebody else did."""
        with self._changed:
            request = self._open.pop(number, None)
            if request is None:
                return None
            if outcome:
                self.counts[outcome] += 1
            room = self._leave_queue(request)
        self._tell(room)
        return request

    def _leave_queue(self, request: Request) -> list[Callable[[], object]]:
        room: list[Callable[[], object]] = []
        if request.queued:
            request.queued = False
            self._queued -= 1
            self._changed.notify_all()
            room, self._room = self._room, room
        return room

    def _tell(self, functions: list[Callable[[], object]]) -> None:
        for function in functions:
            function()

    # What runners tell.

    def never_waits(self) -> None:
        """Of the thread that calls."""
        self._tellers.add(threading.get_ident())

    def begun(self, number: int) -> None:
        self.never_waits()
        with self._changed:
            request = self._open.get(number)
            room = self._leave_queue(request) if request is not None else []
        self._tell(room)

    def step(self, number: int, update: StepUpdate) -> None:
        request = self._open.get(number)
        if request is None or request.on_step is None:
            return
        try:
            request.on_step(update)
        except BaseException as error:
            self.fail(number, error)

    def done(self, number: int, error: BaseException | None) -> None:
        request = self._open.get(number)
        if request is None:
            return
        if isinstance(error, CancelledError):
            self.cancel(number)
        elif error is not None:
            self.fail(number, error)
        else:
            self._complete(request)

    # How a request is answered.

    def _complete(self, request: Request) -> None:
        solve, number = request.job.solve, request.job.number
        try:
            result = solve.result()
            finish_on(result.preds.device)
            steps, status = result.all_steps.flatten().tolist(), result.all_status.flatten().tolist()
        except BaseException as error:
            self.fail(number, error)
            return
        if self._take(number, "completed") is not None:
            with self._changed:
                self.histogram.update(_bin(n) for n, how in zip(steps, status, strict=True) if how != Status.CANCELLED)
            self._answered(partial(request.answer.set_result, result))

    def fail(self, number: int, error: BaseException) -> None:
        """Answers with an error, and stops what runs of the request."""
        request = self._take(number, "failed")
        if request is not None:
            request.runner.cancel(number)
            self._answered(partial(request.answer.set_exception, error))

    def cancel(self, number: int) -> bool:
        """Whether it was not answered yet."""
        request = self._take(number, "cancelled")
        if request is None:
            return False
        request.runner.cancel(number)
        self._answered(request.answer.end_cancelled)
        return True

    def _answered(self, settle: Callable[[], object]) -> None:
        try:
            settle()
        except BaseException:  # such as SystemExit from a callback of the caller's
            _log.exception("a callback of a request's future raised")

    # The end.

    def close(self, why: str) -> None:
        """No more requests; those that wait for room are told."""
        with self._changed:
            self.why_closed = self.why_closed or why
            self._changed.notify_all()
            room, self._room = self._room, []
        self._tell(room)

    def cancel_all(self) -> None:
        """The last first: none begins in the place of another."""
        for number in sorted(list(self._open), reverse=True):
            self.cancel(number)

    def leave_to_parent(self, why: str) -> None:
        """In a forked child; nothing is told, as whoever waits was a thread of the parent."""
        self.why_closed, self.in_child = why, True
        self._open.clear()
        self._queued, self._room = 0, []
        self.runners = {}  # whose locks nobody may release

    def sizes(self) -> tuple[int, int, Counter[str], Counter[int]]:
        """(queued, running, counts, histogram), of one moment."""
        with self._changed:
            running = len(self._open) - self._queued
            return self._queued, running, self.counts.copy(), self.histogram.copy()


def _expire(requests: ref[Requests], number: int) -> None:
    """At a deadline, which keeps alive nothing of a request that was answered long ago."""
    there = requests()
    if there is not None:
        there.never_waits()  # or a callback of the answer could hold up all deadlines
        there.fail(number, DeadlineExceeded("the request's deadline passed before it was answered"))


def finish_on(device: torch.device) -> None:
    """Waits for what this thread has asked of a GPU: the thread that goes on with it may be on another stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def leave_answers_to_parent(why: str) -> None:
    """In a forked child: whoever waits there for an answer is told."""
    for answer in list(_answers):
        answer.leave_to_parent(EngineClosed(why))


def _bin(steps: int) -> int:
    """The least power of two that is no less; 1 for no steps."""
    return 1 << max(steps - 1, 0).bit_length()
