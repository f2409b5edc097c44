"""The op fingerprint, which every solve spends on the weights, against sums in PyTorch and a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
from oplevel import ROUNDS, copying, op_info, op_rows, op_table, turns
from peers.workload import Workload
from rich.table import Table

from eqr_kernels import ops


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("preset", ["sudoku-paper", "sudoku-small"])
@torch.no_grad()
def test_fingerprint(benchmark, tables: list[Table], quick: bool, preset: str) -> None:
    weights = [p.detach().contiguous() for p in Workload(preset, 1).model.parameters()]
    known = ops.fingerprint(weights)
    assert ops.fingerprint([w.clone() for w in weights]) == known
    for weight in weights:
        word = weight.view(-1).view(torch.int32)[-1:]
        word ^= 1  # one bit
        assert ops.fingerprint(weights) != known
        word ^= 1
    moved = sum(w.nbytes for w in weights)  # read only
    candidates = {
        "op": lambda: ops.fingerprint(weights),
        "eager": lambda: [w.view(torch.int32).sum() for w in weights],
        "copy": copying(moved),
    }
    rows = op_rows(turns(candidates, ROUNDS[quick]), "fp32", moved=moved)
    tables.append(op_table(f"fingerprint, weights of {preset}, {moved:,} bytes", rows))
    benchmark.extra_info.update(op="fingerprint", preset=preset, **op_info(), rows=rows)
    benchmark.pedantic(candidates["op"], rounds=5, warmup_rounds=1)
