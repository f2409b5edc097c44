"""The reference backend with graphs that a test gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner, SolveResult, backends
from eqr_kernels.backends.graphed import StepInputs, StepOutputs
from eqr_kernels.backends.reference import ReferenceBackend

TOL = 0.02


def install(monkeypatch: pytest.MonkeyPatch, graphs: Callable[[torch.device], Any]) -> None:
    ours = [ReferenceBackend(graphs) if b.name == "reference" else b for b in backends._BACKENDS]
    monkeypatch.setattr(backends, "_BACKENDS", tuple(ours))


def solve(model: EquilibriumReasoner, tokens: Tensor, **options: Any) -> SolveResult:
    return model.solve(tokens, **{"tol": TOL, "depth": 30, "backend": "reference", "return_all": True, **options})


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
}


def inputs(n: int, value: float) -> StepInputs:
    z = torch.full((n, 2, 3), value)
    return StepInputs(z, z + 1, z + 2, torch.full((n, 4), int(value)))


def step(rows: StepInputs) -> StepOutputs:
    total = rows.z_H + 2 * rows.z_L + 3 * rows.injection + rows.rng[:, :1, None]
    return StepOutputs(total, total + 1, total.sum((1, 2)), 2 * total, 3 * total.sum((1, 2)))
