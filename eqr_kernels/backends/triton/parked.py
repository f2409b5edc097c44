"""Launches of quanta of the persistent kernel: what stays on the device between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.triton import launch
from eqr_kernels.backends.triton.plan import Plan
from eqr_kernels.backends.watch import StreamLaunch, new_control
from eqr_kernels.modules import EqROperator

_INTERPRETED_WIDTH = 8


class TritonParkedRun:
    """See `backends.base.ParkedRun`.

    Args:
        places: puzzles at a time, at least 1.
    """

    def __init__(self, model: EqROperator, problem: FixedPointProblem, plan: Plan, places: int) -> None:
        tokens = problem.tokens.new_zeros(places, plan.S)
        problem = replace(problem, tokens=tokens, ids=problem.ids.new_zeros(places))
        self._plan, self._device, self._breadth = plan, model.device, problem.breadth
        self.width = _INTERPRETED_WIDTH
        if self._device.type == "cuda":
            self.width = launch.resident_programs(model, problem.dtype, plan)
        self._control = new_control(self._device)
        programs = min(self.width, problem.trajectories)
        self._values, self.tables = launch.arguments(model, problem, plan, self._control, programs, parked=True)
        self._programs = programs

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        v = self._values
        v["tokens"][place], v["ids"][place] = tokens, ident
        v["parked"][place * self._breadth : (place + 1) * self._breadth] = 0
        v["best"][place] = torch.iinfo(torch.int64).max

    def launch(self, rows: Sequence[int], quantum: int) -> None:
        v = self._values
        v["counters"].zero_()
        v |= dict(rows=torch.tensor(rows, device=self._device), count=len(rows), quantum=quantum)
        programs = min(self._programs, len(rows))
        if self._device.type == "cpu":
            with launch.INTERPRETER:
                launch.launch(v, self._plan, programs)
            return
        with torch.cuda.device(self._device):
            launch.launch(v, self._plan, programs)
            StreamLaunch().wait()
