"""The reference backend with graphs that a test gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner, SolveResult, backends
from eqr_kernels.backends.graphed import StepInputs, StepOutputs
from eqr_kernels.backends.reference import ReferenceBackend
from eqr_kernels.tasks.common import Tokens
from eqr_kernels.tasks.views import Turns, Views

TOL = 0.02


def install(monkeypatch: pytest.MonkeyPatch, graphs: Callable[[torch.device], Any]) -> None:
    ours = [ReferenceBackend(graphs) if b.name == "reference" else b for b in backends._BACKENDS]
    monkeypatch.setattr(backends, "_BACKENDS", tuple(ours))


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    return model.solve(tokens, **{"tol": TOL, "depth": 30, "backend": "reference", "return_all": True, **options})


def mirrored(inputs: Tokens, count: int) -> Views:
    """Puzzles, uint8 [N, 6], and their cells the other way round, by turns."""
    cells = np.stack([np.arange(6)[:: 1 if view % 2 == 0 else -1] for view in range(count)])
    names = np.broadcast_to(np.arange(7, dtype=np.uint8), (len(inputs), count, 7))
    return Views.of(inputs, np.broadcast_to(cells, (len(inputs), count, 6)), names)


CASES = {
    "all at once": {},
    "a queue": dict(slots=5, breadth=3),
    "one slot": dict(slots=1),
    "fixed depth, traced": dict(halt="none", depth=6, trace=True, slots=7),
    "checkpoints": dict(checkpoints=(1, 2, 7, 30), breadth=2, slots=9),
    "q halting, vote": dict(halt="q", select="q", depth=10),
    "both signals": dict(halt="residual+q", breadth=2, slots=9),
    "either signal": dict(halt="residual|q", breadth=2, slots=9),
    "race": dict(select="first", breadth=6, slots=8, checkpoints=(3, 30)),
    "bf16": dict(precision="bf16", depth=5),
    "patience": dict(patience=3, select="vote", breadth=2),
    "turns": dict(turns=Turns(3, mirrored, cycle=2), slots=5, breadth=2, checkpoints=(1, 7, 30)),
}


def inputs(n: int, value: float) -> StepInputs:
    z = torch.full((n, 2, 3), value)
    return StepInputs(z, z + 1, z + 2, torch.full((n, 4), int(value)))


def step(rows: StepInputs) -> StepOutputs:
    total = rows.z_H + 2 * rows.z_L + 3 * rows.injection + rows.rng[:, :1, None]
    return StepOutputs(total, total + 1, total.sum((1, 2)), 2 * total, 3 * total.sum((1, 2)))
