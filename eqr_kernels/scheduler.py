"""Dynamic scheduling of independent rows: each is iterated until it has ended, and a waiting one takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

GOING = -1
"""The status of a row that goes on; those of rows that have ended are `eqr_kernels.trajectory.Status`."""


class Running(Protocol):
    """Rows in flight: a NamedTuple of tensors (or tuples of tensors) with a row for each."""

    @property
    def number(self) -> Tensor:
        """int64 [n], of the rows among all, on the device."""


R = TypeVar("R", bound=Running)


class Operator(Protocol[R]):
    """What is iterated, and what becomes of its rows."""

    def admit(self, number: Tensor) -> R:
        """The rows of these numbers, int64 [m] on the host, at their starts; fewer where some need not run."""

    def advance(self, rows: R) -> tuple[R, Tensor]:
        """One step of all rows: the rows after it, and which have ended (and are recorded), bool [n] on the host."""

    def stop(self, rows: R, waiting: Tensor) -> None:
        """The caller wants no more: of rows in flight, and of the numbers that never began, int64 [m] on the host."""


Proceed = Callable[[int, int], bool]
"""(rows that have ended, steps of all rows so far) -> False to stop what is left."""


def iterate(operator: Operator[R], count: int, slots: int, proceed: Proceed) -> None:
    """Iterates rows 0..count-1, at most `slots` at a time, each to its end.

    Args:
        proceed: asked before each step, and with the last numbers at the end.
    """
    rows, queued, spent = operator.admit(_numbers(0, min(slots, count))), min(slots, count), 0
    while True:
        running = len(rows.number)
        if not proceed(queued - running, spent):
            operator.stop(rows, _numbers(queued, count))
            return
        if not running and queued == count:
            return
        if running:
            rows, ended = operator.advance(rows)
            spent += running
            if ended.any():
                rows = take(rows, to_device((~ended).nonzero()[:, 0], rows.number.device))
        free = min(slots - len(rows.number), count - queued)
        if free:
            rows = join(rows, operator.admit(_numbers(queued, queued + free)))
            queued += free


def _numbers(start: int, end: int) -> Tensor:
    return torch.arange(start, end, device="cpu")


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Decisions of the host, any shape, on the device: staged from pageable memory, so that the host does not wait."""
    return numbers.to(device, non_blocking=True)


def take(rows: Any, index: Tensor) -> Any:
    """Those of `index`, int64 [m], of every tensor [n, ...] in a tree."""
    return pytree.tree_map(lambda field: field[index], rows)


def join(rows: Any, others: Any) -> Any:
    """Two trees of tensors [n, ...], [m, ...] as one of [n + m, ...]."""
    return pytree.tree_map(lambda field, other: torch.cat([field, other]), rows, others)


def bucket(n: int, exact: int = 1) -> int:
    """Rows that a step of n rows computes, so that few shapes of arithmetic occur; at least n.

    n itself up to `exact`, a power of two up to 64, then one of eight sizes an octave: what padding adds must not cost
    more than it saves. With `exact` of 16 it is one of eight sizes an octave from there on.
    """
    bits = (n - 1).bit_length()
    if n <= exact:
        return n
    step = 1 << (bits if bits <= 6 and exact < 16 else bits - 4)
    return -(n // -step) * step


def pad(rows: Any, n: int, size: int) -> Any:
    """A tree of n rows up to `size`, by repeating some: padding must not meet numbers that no row meets."""
    if size == n:
        return rows
    return pytree.tree_map(lambda field: field[torch.arange(size, device=field.device) % n], rows)
