"""The op pack_weights in every precision, against casting the same weights in PyTorch, and a copy of as many bytes.

What it packs is used for a latent recursion, which must be that of the reference, before anything is timed.
"""

from __future__ import annotations

import pytest
import torch
from oplevel import ROUNDS, copying, op_info, op_rows, op_table, turns
from peers.workload import DTYPES, Workload
from rich.table import Table
from test_latent_recursions import check

from eqr_kernels import ops
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.precision import Precision


def cast(weights: tuple[torch.Tensor, ...], precision: str) -> list[torch.Tensor]:
    """What PyTorch would be given: weights of any shape in the precision, in int8 with a scale for each row."""
    if precision != "int8":
        return [w.to(DTYPES[precision], copy=True) for w in weights]
    scales = [w.abs().amax(1, keepdim=True) / 127 for w in weights]
    return [(w / s).round_().to(torch.int8) for w, s in zip(weights, scales, strict=True)]


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("preset", ["sudoku-paper", "sudoku-small"])
@torch.no_grad()
def test_pack_weights(benchmark, tables: list[Table], quick: bool, preset: str, precision: str) -> None:
    if quick and preset != "sudoku-small":
        pytest.skip("left out by --quick")
    work = Workload(preset, 2)
    check(work, precision)
    weights = PackArguments.of(work.model)
    packed = weights.pack(Precision[precision]).data
    moved = sum(w.nbytes for w in weights.tensors()) + packed.nbytes
    candidates = {
        "op": lambda: weights.pack(Precision[precision]),
        "eager": lambda: cast([w for block in weights.weights.blocks for w in block], precision),
        "copy": copying(moved),
    }
    rows = op_rows(turns(candidates, ROUNDS[quick]), precision, moved=moved)
    tables.append(op_table(f"pack_weights, {preset}, {packed.nbytes:,} bytes", rows))
    benchmark.extra_info.update(op="pack_weights", preset=preset, packed_bytes=packed.nbytes, **op_info(), rows=rows)
    benchmark.pedantic(candidates["op"], rounds=5, warmup_rounds=1)
