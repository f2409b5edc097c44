"""Launches of quanta of the persistent kernel: what stays on the device between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.triton import launch
from eqr_kernels.backends.triton.plan import Plan
from eqr_kernels.backends.watch import Beside, new_control
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
        self._rules, self._plan, self._device = problem, plan, model.device
        on_gpu = self._device.type == "cuda"
        self.width = launch.resident_programs(model, problem.dtype, plan) if on_gpu else _INTERPRETED_WIDTH
        self._beside = Beside(self._device) if on_gpu else None
        self._control = new_control(self._device)
        self._values, self.tables = launch.arguments(model, problem, plan, self._control, self.width, parked=True)

    def grow(self, places: int) -> None:
        v, breadth = self._values, self._rules.breadth
        have = len(v["ids"])
        fills = dict(z=0, logits=0, ring=0, parked=0, tokens=0, ids=0, best=launch.NOBODY)
        grown = {}
        for name, fill in fills.items():
            each = breadth if name in ("z", "logits", "ring", "parked") else 1
            more = v[name].new_full(((places - have) * each, *v[name].shape[1:]), fill)
            grown[name] = torch.cat([v[name], more])
        self.tables = self.tables.grown(self._rules, places * breadth)
        v |= grown | launch.table_arguments(self.tables) | dict(trajectories=places * breadth)

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        v, breadth = self._values, self._rules.breadth
        v["tokens"][place], v["ids"][place] = tokens, ident
        v["parked"][place * breadth : (place + 1) * breadth] = 0
        v["best"][place] = launch.NOBODY
        self.tables.forget(place * breadth, breadth)

    def launch(self, rows: Sequence[int], quantum: int) -> None:
        v, programs = self._values, min(self.width, len(rows))
        with launch.INTERPRETER if self._beside is None else self._beside.launching():
            v["counters"].zero_()
            v |= dict(rows=torch.tensor(rows, device=self._device), count=len(rows), quantum=quantum)
            launch.launch(v, self._plan, programs)
