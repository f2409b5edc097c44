"""Dynamic scheduling of independent rows: each is iterated until it has ended, and a waiting one takes its place.

Rows in flight are trees of tensors with a row for each, in one of a few sizes, so that few shapes of arithmetic occur.
A row that has ended stays where it is as padding until another takes its place or a smaller size will do: nothing is
copied in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

GOING = -1
"""The status of a row that goes on; those of rows that have ended are `eqr_kernels.trajectory.Status`."""


class Running(Protocol):
    """Rows in flight: a NamedTuple of tensors, or of tuples of tensors."""

    @property
    def number(self) -> Tensor:
        """int64 [m], of the rows among all, on the device."""


R = TypeVar("R", bound=Running)


class Operator(Protocol[R]):
    """What is iterated, and what becomes of its rows."""

    def admit(self, number: Tensor) -> R:
        """The rows of these numbers, int64 [m] on the host, at their starts; fewer where some need not run."""

    def advance(self, rows: R, going: Tensor) -> tuple[R, Tensor]:
        """One step of all rows.

        Args:
            going: bool [m] on the host; the others are padding.

        Returns:
            The rows after the step, and which of those that were going have ended (and are recorded), bool [m] on the
            host.
        """

    def stop(self, rows: R, waiting: Tensor) -> None:
        """The caller wants no more steps: of `rows`, those in flight without padding, which keep what they have, and of
        the numbers `waiting`, int64 on the host, which never began."""


Proceed = Callable[[int, int], bool]
"""(rows that have ended, steps of all rows so far) -> False to stop what is left. Called at the beginning, now and then
(by `iterate` before every step), and with the last numbers at the end."""
Size = Callable[[int], int]
"""Rows that a step of n rows computes, at least n."""


class Stepper(Protocol):
    """A run that goes on when it is told to, such as `Iteration`, which see."""

    @property
    def ended(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def spent(self) -> int: ...

    def step(self) -> bool: ...

    def stop(self) -> None: ...


class Iteration(Generic[R]):
    """Rows 0..count-1 of an operator, at most `slots` at a time, each to its end, step by step.

    Attributes:
        ended: rows that have ended. running: rows in flight.
        spent: steps of all rows so far. computed: rows that the steps have computed, padding included.
    """

    def __init__(self, operator: Operator[R], count: int, slots: int, size: Size) -> None:
        self._operator, self._count, self._slots, self._size = operator, count, slots, size
        self._queued = min(slots, count)
        self.spent = self.computed = 0
        rows = operator.admit(_numbers(0, self._queued))
        self._rows, self._going = _resized(rows, torch.ones(len(rows.number), dtype=torch.bool, device="cpu"), size)
        self.running = int(self._going.sum())

    @property
    def ended(self) -> int:
        return self._queued - self.running

    def step(self) -> bool:
        """One step of the rows in flight, then others in the place of those that have ended; False: all had ended."""
        rows, going = self._rows, self._going
        if self.running:
            rows, ended = self._operator.advance(rows, going)
            going = going & ~ended
            self.computed, self.spent = self.computed + len(going), self.spent + self.running
            self.running = int(going.sum())
        elif self._queued == self._count:
            return False
        free = min(self._slots - self.running, self._count - self._queued)
        if free:
            rows, going = _placed(rows, going, self._operator.admit(_numbers(self._queued, self._queued + free)))
            self._queued += free
        self._rows, self._going = _resized(rows, going, self._size)
        self.running = int(self._going.sum())
        return True

    def stop(self) -> None:
        """The caller wants no more steps."""
        waiting = _numbers(self._queued, self._count)
        self._operator.stop(take(self._rows, _places(self._going, self._rows)), waiting)


def iterate(operator: Operator[R], count: int, slots: int, proceed: Proceed, size: Size) -> int:
    """Iterates rows 0..count-1, at most `slots` at a time, each to its end.

    Args:
        proceed: asked before each step, and with the last numbers at the end.
        size: such as `bucket`.

    Returns:
        Rows that the steps have computed, padding included.
    """
    iteration = Iteration(operator, count, slots, size)
    run(iteration, proceed)
    return iteration.computed


def run(iteration: Stepper, proceed: Proceed) -> None:
    """Steps until all rows have ended, or `proceed`, asked before each step and at the end, says no."""
    while proceed(iteration.ended, iteration.spent):
        if not iteration.step():
            return
    iteration.stop()


def _numbers(start: int, end: int) -> Tensor:
    return torch.arange(start, end, device="cpu")


def _places(chosen: Tensor, rows: Running) -> Tensor:
    """The indices of `chosen`, bool [m] on the host, on the device."""
    return to_device(chosen.nonzero()[:, 0], rows.number.device)


def _placed(rows: R, going: Tensor, fresh: R) -> tuple[R, Tensor]:
    """The fresh rows in places of padding, and behind the others where there is none."""
    m = len(fresh.number)
    free = (~going).nonzero()[:m, 0]
    if len(free):
        into = to_device(free, rows.number.device)
        rows = pytree.tree_map(lambda field, new: field.index_copy(0, into, new[: len(free)]), rows, fresh)
        going = going.index_fill(0, free, True)
    if len(free) < m:
        rows = pytree.tree_map(lambda field, new: torch.cat([field, new[len(free) :]]), rows, fresh)
        going = torch.cat([going, going.new_ones(m - len(free))])
    return rows, going


def _resized(rows: R, going: Tensor, size: Size) -> tuple[R, Tensor]:
    """As many rows as the size of those that go on, with repeated or ended ones as padding."""
    running, present = int(going.sum()), len(going)
    wanted = size(running) if running else 0
    if wanted == present:
        return rows, going
    order = torch.cat([going.nonzero()[:, 0], (~going).nonzero()[:, 0]])
    index = order[torch.arange(wanted, device="cpu") % max(present, 1)]
    kept: R = take(rows, to_device(index, rows.number.device))
    return kept, torch.arange(wanted, device="cpu") < running


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Decisions of the host, any shape, on the device: staged from pageable memory, so that the host does not wait."""
    return numbers.to(device, non_blocking=True)


def take(rows: Any, index: Tensor) -> Any:
    """Those of `index`, int64 [m], of every tensor [n, ...] in a tree."""
    return pytree.tree_map(lambda field: field[index], rows)


def bucket(n: int) -> int:
    """A power of two up to 64, then one of eight sizes an octave: padding must not cost more than it saves."""
    bits = (n - 1).bit_length()
    step = 1 << (bits if bits <= 6 else bits - 4)
    return -(n // -step) * step


def fine_bucket(n: int) -> int:
    """n up to 16, then one of eight sizes an octave: an eighth of padding at most, where work is all that costs."""
    step = 1 << max((n - 1).bit_length() - 4, 0)
    return -(n // -step) * step


def exactly(n: int) -> int:
    """n: no padding."""
    return n
