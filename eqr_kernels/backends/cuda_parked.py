"""Launches of quanta of the CUDA kernels: what stays on the device between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels._nvtx import nvtx_range
from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.watch import StreamLaunch, new_control


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
        self._tokens, self._ids = problem.tokens.new_zeros(places, tokens), problem.ids.new_zeros(places)
        self._parked = ops.Parked(
            states=torch.empty(trajectories * plan["slot_bytes"], dtype=torch.uint8, device=device),
            control=torch.zeros(trajectories, plan["parked_bytes"] // 8, dtype=torch.int64, device=device),
            best=torch.full((places if problem.race else 0,), -1, dtype=torch.int64, device=device),
        )
        self.tables = ops.Tables.empty(problem, trajectories, tokens, vocabulary, device)
        self._control = new_control(device)

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        breadth = self._rules.breadth
        self._tokens[place], self._ids[place] = tokens, ident
        self._parked.control[place * breadth : (place + 1) * breadth] = 0
        if self._rules.race:
            self._parked.best[place] = -1

    def launch(self, rows: Sequence[int], quantum: int) -> None:
        device = self._tokens.device
        with torch.cuda.device(device), nvtx_range(f"eqr launch: {self._kernel}, {len(rows)} trajectories"):
            which = torch.tensor(rows, dtype=torch.int64, device=device)
            arguments = (self._tokens, self._ids, self._control, self._rules, which, quantum, self._parked, self.tables)
            ops.fixed_point_quantum(self._packed, *arguments)
            StreamLaunch().wait()
