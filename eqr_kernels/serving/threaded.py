"""A runner that computes in one Python thread: how jobs come to it, and how it ends."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.serving.errors import EngineClosed
from eqr_kernels.serving.runner import Events, Job, RunnerStats


class ThreadedRunner(ABC):
    """See `runner.Runner`. All but its methods there belongs to the thread."""

    def __init__(self, events: Events) -> None:
        self._events = events
        # What the thread learns from others: a queue that a finalizer may put into.
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._open = fork_safe_lock()  # held where a job is put, so that none comes behind the end
        self._closing = False
        self._waiting: OrderedDict[int, Job] = OrderedDict()
        self._steps, self._busy, self._busy_since = 0, 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="eqr-engine", daemon=True)
        self._thread.start()

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Trajectories that have a state; from any thread."""

    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether there is work besides what waits."""

    @abstractmethod
    def _work(self) -> None:
        """Some work of what waits and what has begun, of which there is some; reads messages now and then."""

    @abstractmethod
    def _drop(self, number: int) -> None:
        """A job is cancelled; it may have ended."""

    @abstractmethod
    def _drop_all(self) -> list[int]:
        """Forgets all jobs that have begun; their numbers."""

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
        return RunnerStats(self.in_flight, self._steps, busy, 1)

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

    def _run(self) -> None:
        while True:
            self._read(wait=not (self._waiting or self._has_begun()))
            if self._waiting or self._has_begun():
                try:
                    self._work()
                except BaseException as error:  # whose it is nobody knows; whoever waits must not wait for ever
                    for number in [*self._drop_all(), *self._waiting]:
                        self._events.done(number, error)
                    self._waiting.clear()
            elif self._closing and self._inbox.empty():
                return

    def _read(self, wait: bool = False) -> None:
        """Does what the messages say."""
        wait = wait and not self._closing
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Time inside counts as busy."""
        self._busy_since = time.perf_counter()
        try:
            yield
        finally:
            self._busy, self._busy_since = self._busy + time.perf_counter() - self._busy_since, 0.0
