"""What ends engines that nobody closed: a garbage collection, the end of the interpreter, and a fork in the child."""

from __future__ import annotations

import atexit
import os
from weakref import WeakSet

from eqr_kernels.serving.requests import Requests, leave_answers_to_parent
from eqr_kernels.serving.runner import Runner

PATIENCE = 10.0
"""Seconds that the end of the interpreter waits at most for an outer step under way."""
_FORKED = (
    "this process was forked from that of the engine, whose threads are not here; make an Engine here, or start the "
    "process with multiprocessing's 'spawn' or 'forkserver'"
)
_live: WeakSet[Work] = WeakSet()


class Work:
    """All of an engine that its threads hold, so that the engine itself can be collected.

    Attributes:
        requests: not answered yet. runners: by kind, made when they are first needed.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.runners: dict[str, Runner] = {}
        self.in_child = False
        _live.add(self)

    def let_go(self) -> None:
        """The engine was collected: what was submitted is answered, then the threads end. Takes no lock."""
        if not self.in_child:
            for runner in list(self.runners.values()):
                runner.close(timeout=0)

    def close(self, why: str, *, cancel: bool, timeout: float | None = None) -> None:
        if self.in_child:
            return
        self.requests.close(why)
        if cancel:
            self.requests.cancel_all()
        for runner in list(self.runners.values()):
            runner.close(timeout)


def _at_exit() -> None:
    for work in list(_live):
        work.close("the interpreter is ending", cancel=True, timeout=PATIENCE)


def _in_child() -> None:
    for work in list(_live):
        work.in_child = True
        work.requests.leave_to_parent(_FORKED)
    leave_answers_to_parent(_FORKED)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
