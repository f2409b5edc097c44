"""Calls at given times, from one thread for all engines of the process."""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable
from itertools import count
from queue import Empty, SimpleQueue

from eqr_kernels.forking import fork_safe_lock

_log = logging.getLogger(__name__)
_Entry = tuple[float, int, Callable[[], object]]


class _Clock:
    """Sleeps until the first of its times, or until it gets another; it starts with the first and never ends."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Entry] = SimpleQueue()
        threading.Thread(target=self._run, name="eqr-deadlines", daemon=True).start()

    def add(self, entry: _Entry) -> None:
        self._inbox.put(entry)

    def _run(self) -> None:
        entries: list[_Entry] = []
        while True:
            try:
                left = max(0.0, min(entries[0][0] - time.monotonic(), threading.TIMEOUT_MAX)) if entries else None
                heapq.heappush(entries, self._inbox.get(timeout=left))
            except Empty:
                if entries[0][0] <= time.monotonic():
                    try:
                        heapq.heappop(entries)[2]()
                    except BaseException:  # the others' times must come all the same
                        _log.exception("what a deadline calls raised")


_lock = fork_safe_lock()
_clocks: dict[int, _Clock] = {}  # by process: a forked child has none
_order = count()


def call_at(when: float, function: Callable[[], object]) -> None:
    """Calls `function`, which must return soon, at `time.monotonic() == when`."""
    with _lock:
        clock = _clocks.get(os.getpid())
        if clock is None:
            clock = _clocks[os.getpid()] = _Clock()
    clock.add((when, next(_order), function))
