"""What a forked child must not inherit: threads that are not there any more, and locks that nobody will release."""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

import torch

_LOCKS: WeakSet[threading.Lock | threading.RLock] = WeakSet()
_TASKS = "/proc/self/task"
_had_threads = False
_threads_of_parent = 1
_in_forked_child = False


def fork_safe_lock() -> threading.Lock:
    """A lock that is free again in a child that was forked while another thread held it."""
    lock = threading.Lock()
    _LOCKS.add(lock)
    return lock


def fork_safe_rlock() -> threading.RLock:
    """As `fork_safe_lock`, for what a finalizer may ask for: a collection can come while its thread holds the lock."""
    lock = threading.RLock()
    _LOCKS.add(lock)
    return lock


def check_threads() -> None:
    """Raises where work on several threads would wait for ever.

    Raises:
        RuntimeError: this process was forked from one whose threads OpenMP would wait for, and torch may use several.
    """
    if _in_forked_child and torch.get_num_threads() > 1:
        raise RuntimeError(
            f"this process was forked from one that computed on {_threads_of_parent} threads, where OpenMP waits for "
            f"ever once torch uses more than one, and it may use {torch.get_num_threads()}: leave out "
            "torch.set_num_threads, or start the process with multiprocessing's 'spawn' or 'forkserver'"
        )


def _before() -> None:
    global _had_threads, _threads_of_parent
    _threads_of_parent = torch.get_num_threads()
    # Where nobody can tell, there are as many as torch may have started.
    _had_threads = len(os.listdir(_TASKS)) > 1 if os.path.isdir(_TASKS) else torch.get_num_threads() > 1


def _in_child() -> None:
    global _in_forked_child
    for lock in _LOCKS:
        lock._at_fork_reinit()  # type: ignore[union-attr]
    # OpenMP would wait for ever for threads that it started in the parent.
    if _had_threads:
        _in_forked_child |= _threads_of_parent > 1
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
