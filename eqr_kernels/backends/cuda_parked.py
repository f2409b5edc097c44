"""Launches of quanta of the CUDA kernels: what stays on the device between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.watch import Beside, new_control


class CudaParkedRun:
    """See `backends.base.ParkedRun`.

    Args:
        packed: the weights for the planned kernel.
        problem: of any puzzles: its rules are the run's.
        plan: of `backends.cuda.plan`, for more trajectories than the device takes.
        places: puzzles at a time, at least 1.
    """

    def __init__(
        self, packed: ops.PackedWeights, problem: FixedPointProblem, plan: dict[str, Any], places: int
    ) -> None:
        self._packed, self._rules, self._kernel = packed, problem, plan["kernel"]
        self.width = plan["slots"]
        device = problem.tokens.device
        tokens, _, vocabulary, *_ = packed.operator.sizes
        trajectories = places * problem.breadth
        self._slot_bytes, self._words = plan["slot_bytes"], plan["parked_bytes"] // 8
        self._tokens, self._ids = problem.tokens.new_zeros(places, tokens), problem.ids.new_zeros(places)
        self._parked = self._empty(places)
        self.tables = ops.Tables.empty(problem, trajectories, tokens, vocabulary, device)
        self._control, self._beside = new_control(device), Beside(device)

    def _empty(self, places: int) -> ops.Parked:
        device, trajectories = self._tokens.device, places * self._rules.breadth
        return ops.Parked(
            states=torch.empty(trajectories * self._slot_bytes, dtype=torch.uint8, device=device),
            control=torch.zeros(trajectories, self._words, dtype=torch.int64, device=device),
            best=torch.full((places if self._rules.race else 0,), -1, dtype=torch.int64, device=device),
        )

    def grow(self, places: int) -> None:
        missing = places - len(self._ids)
        more = self._empty(missing)
        parked = ops.Parked(*(torch.cat(pair) for pair in zip(self._parked, more, strict=True)))
        self.tables = self.tables.grown(self._rules, places * self._rules.breadth)
        self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(missing, self._tokens.shape[1])])
        self._ids = torch.cat([self._ids, self._ids.new_zeros(missing)])
        self._parked = parked

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        breadth = self._rules.breadth
        self._tokens[place], self._ids[place] = tokens, ident
        self._parked.control[place * breadth : (place + 1) * breadth] = 0
        if self._rules.race:
            self._parked.best[place] = -1
        self.tables.forget(place * breadth, breadth)

    def launch(self, rows: Sequence[int], quantum: int) -> None:
        with self._beside.launching(), nvtx_range(f"eqr launch: {self._kernel}, {len(rows)} trajectories"):
            which = torch.tensor(rows, dtype=torch.int64, device=self._tokens.device)
            self._control.zero_()
            arguments = (self._tokens, self._ids, self._control, self._rules, which, quantum, self._parked, self.tables)
            ops.fixed_point_quantum(self._packed, *arguments)
