"""How engines end: by `close`, or where nobody calls it, by a collection, the interpreter's end, or a fork."""

from __future__ import annotations

import atexit
import os
import weakref

from eqr_kernels.serving.requests import Requests, leave_answers_to_parent

PATIENCE = 10.0
"""Seconds that the end of the interpreter waits at most for an outer step under way."""
_FORKED = (
    "this process was forked from that of the engine, whose threads are not here; make an Engine here, or start the "
    "process with multiprocessing's 'spawn' or 'forkserver'"
)
# What an engine's threads hold; the engine itself can be collected.
_live: weakref.WeakSet[Requests] = weakref.WeakSet()


def watch(engine: object, requests: Requests) -> None:
    """Ends an engine that nobody closes."""
    _live.add(requests)
    weakref.finalize(engine, _let_go, requests).atexit = False


def close(requests: Requests, why: str, *, cancel: bool, timeout: float | None = None) -> None:
    """See `Engine.close`; it returns after `timeout` seconds at most."""
    if requests.in_child:
        return
    requests.close(why)
    if cancel:
        requests.cancel_all()
    for runner in list(requests.runners.values()):
        runner.close(timeout)


def _let_go(requests: Requests) -> None:
    """The engine was collected: what was submitted is answered, then the threads end. Takes no lock."""
    if not requests.in_child:
        for runner in list(requests.runners.values()):
            runner.close(timeout=0)


def _at_exit() -> None:
    for requests in list(_live):
        close(requests, "the interpreter is ending", cancel=True, timeout=PATIENCE)


def _in_child() -> None:
    for requests in list(_live):
        requests.leave_to_parent(_FORKED)
    leave_answers_to_parent(_FORKED)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
