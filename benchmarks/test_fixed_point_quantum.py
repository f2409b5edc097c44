"""The op fixed_point_quantum: a run in launches of a few outer steps, its states parked on the device, against one
launch of fixed_point for the whole of it.

The difference is what launching, parking and looking at the statuses cost. Rows do not depend on their company: both
give the same bits, which is checked first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oplevel import ROUNDS, full_depth, op_info, op_rows, op_table, turns
from rich.table import Table
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, noise, ops
from eqr_kernels.backends import FixedPointProblem
from eqr_kernels.backends.cuda import CudaBackend
from eqr_kernels.precision import Precision
from eqr_kernels.scheduler import GOING

DEPTH = 16
QUANTA = [4, 16]


class _Logits:
    """A recorder of the answers' logits alone."""

    def __init__(self) -> None:
        self.logits = torch.empty(0)

    def winners(self, restart: Tensor, logits: Tensor, states: object = None) -> None:
        self.logits = logits

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(ops.why_not_cuda() is not None, reason=str(ops.why_not_cuda()))
@pytest.mark.parametrize("puzzles", [1, 132])
@pytest.mark.parametrize("quantum", QUANTA)
@torch.no_grad()
def test_fixed_point_quantum(benchmark, tables: list[Table], quick: bool, puzzles: int, quantum: int) -> None:
    torch.manual_seed(0)
    model = EquilibriumReasoner(EqRConfig.sudoku_paper()).bfloat16().cuda().eval()
    tokens = torch.randint(1, 11, (puzzles, model.config.seq_len), device="cuda")
    problem = FixedPointProblem(
        tokens=tokens,
        ids=noise.hash_tokens(tokens),
        **vars(full_depth(DEPTH, model.config.noise_scale, slots=puzzles)),
        precision=Precision.bf16,
    )
    backend = CudaBackend()
    run = backend.parked_run(model, problem, puzzles)

    def op() -> Tensor:
        for place in range(puzzles):
            run.begin(place, tokens[place], problem.ids[place])
        going = list(range(puzzles))
        while going:
            run.launch(going, quantum)
            status = run.tables.status[-1, going].tolist()
            going = [row for row, now in zip(going, status, strict=True) if now == GOING]
        return run.tables.logits

    def whole() -> Tensor:
        recorder = _Logits()
        backend.fixed_point(model, replace(problem, slots_asked=False), recorder, lambda *_: True)  # type: ignore
        return recorder.logits

    assert torch.equal(op(), whole())
    rows = op_rows(turns({"op": op, "fixed_point": whole}, ROUNDS[quick]), "bf16")
    name = f"fixed_point_quantum, {puzzles} puzzles of sudoku-paper, {DEPTH} outer steps in quanta of {quantum}"
    tables.append(op_table(name, rows))
    info = dict(op="fixed_point_quantum", puzzles=puzzles, depth=DEPTH, quantum=quantum)
    benchmark.extra_info.update(**info, **op_info(), rows=rows)
    benchmark.pedantic(op, rounds=5, warmup_rounds=1)
