"""The op adam_atan2_ on all weights of a preset, against the same update in PyTorch, and a copy of as many bytes.

Both make the same update of the same weights before anything is timed.
"""

from __future__ import annotations

import pytest
import torch
from oplevel import ROUNDS, copying, op_info, op_rows, op_table, turns
from peers.trainer import random_model
from peers.workload import PRESETS, relative_error
from rich.table import Table

from eqr_kernels import ops
from eqr_kernels.training.fused import FusedAdamATan2
from eqr_kernels.training.optim import AdamATan2


def optimizer_of(kind: type[AdamATan2], preset: str) -> AdamATan2:
    """After a first update."""
    model, generator = random_model(PRESETS[preset]()), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = kind(model.parameters(), 1e-3)
    optimizer.step()
    return optimizer


def weights_of(optimizer: AdamATan2) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("preset", ["sudoku-paper", "sudoku-trm"])
def test_adam_atan2(benchmark, tables: list[Table], quick: bool, preset: str) -> None:
    if quick and preset != "sudoku-trm":
        pytest.skip("left out by --quick")
    fused, plain = (optimizer_of(kind, preset) for kind in (FusedAdamATan2, AdamATan2))
    error = relative_error(weights_of(fused), weights_of(plain))
    assert error < 1e-6, f"the error of the weights is {error:.2g}"
    moved = 7 * weights_of(fused).nbytes  # weights and both moments are read and written, the gradients read
    candidates = {"op": fused.step, "eager": plain.step, "copy": copying(moved)}
    rows = op_rows(turns(candidates, ROUNDS[quick]), "fp32", moved=moved)
    tables.append(op_table(f"adam_atan2_, {preset}, {moved // 28:,} weights", rows))
    benchmark.extra_info.update(op="adam_atan2_", preset=preset, error=error, **op_info(), rows=rows)
    benchmark.pedantic(candidates["op"], rounds=5, warmup_rounds=1)
