"""A fixed-point run on CPU that stays: problems join it while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eqr_kernels.ops.fixed_point import NO_START, NO_TURNS, FixedPointOutput, StartStates, TurnCells, check_arguments
from eqr_kernels.ops.library import require
from eqr_kernels.ops.operator import PackedWeights
from eqr_kernels.run_rules import RunRules


class Begun(NamedTuple):
    """All trajectories of a problem have begun: none of it waits."""

    number: int


class Stepped(NamedTuple):
    """A trajectory has taken an outer step."""

    number: int
    puzzle: int
    restart: int
    status: int
    """Of `eqr_kernels.Status`, or -1 where it goes on."""
    steps: int
    residual: float
    q_halt: float
    preds: Sequence[int]
    """[S]"""


class Done(NamedTuple):
    """A problem has ended: what it was given and what it gave are its caller's again."""

    number: int
    outcome: str
    """"complete", "cancelled" or "failed"."""
    error: str
    """What went wrong, of one that failed."""


class RunCounts(NamedTuple):
    in_flight: int
    """Trajectories with a state."""
    steps: int
    """Outer steps of all problems so far."""
    busy_seconds: float
    """That its threads spent in them, all together."""


class OpenRun:
    """Problems join it from any thread, and its own threads take turns at their trajectories.

    Its results are those of `ops.fixed_point`, bit for bit.

    Args:
        threads: at least 1. Where there are fewer trajectories, several work at one.
        quantum: outer steps that a trajectory takes while others wait, at least 1.
        in_flight: trajectories with a state at most, at least 1; threads that have none help.
        policy: "least_service" (next is the problem that has had the fewest outer steps, in quanta) or "fifo".

    Raises:
        RuntimeError: there is no extension.
        ValueError: an argument is not as above.
    """

    def __init__(self, *, threads: int, quantum: int, in_flight: int, policy: str) -> None:
        self._run = require().OpenRun(threads=threads, quantum=quantum, in_flight=in_flight, policy=policy)

    def join(
        self,
        packed: PackedWeights,
        tokens: Tensor,
        ids: Tensor,
        control: Tensor,
        rules: RunRules,
        *,
        number: int,
        start: StartStates | None = None,
        keep_states: bool = False,
        turns: TurnCells | None = None,
        steps: bool = False,
    ) -> FixedPointOutput:
        """A problem joins the run.

        The arguments are those of `ops.fixed_point`; `rules.slots` is not looked at. The run keeps them and the output,
        which is written while it goes on, until `take` has given the problem's `Done`.

        Args:
            number: the caller's name for it, new among those that have not ended.
            steps: whether each outer step of each trajectory is an event.

        Raises:
            TypeError, ValueError: an argument is not as above, or the run is closed.
        """
        check_arguments(packed, tokens, ids, control)
        given = (*(start or NO_START), keep_states, *(turns or NO_TURNS))
        args = (*packed.operator, *rules.in_order(), *given, self._run.handle, number, steps)
        output = torch.ops.eqr_kernels.open_run_join.default(packed.data, tokens, ids, control, *args)
        return FixedPointOutput(*output)

    def cancel(self, number: int) -> None:
        """What is left of a problem ends at its next outer step; nothing where there is none of this number."""
        self._run.cancel(number)

    def close(self) -> None:
        """Nobody joins any more; what is there comes to its end."""
        self._run.close()

    def take(self) -> list[Begun | Stepped | Done]:
        """Waits for events, without the GIL, and gives them in their order; [] once it is closed and all have ended."""
        kinds = {1: Begun, 3: Done, 8: Stepped}
        return [kinds[len(event)](*event) for event in self._run.take()]

    def counts(self) -> RunCounts:
        return RunCounts(*self._run.counts())
