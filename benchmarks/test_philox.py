"""The ops philox_words and philox_normal, against PyTorch's own random numbers and the same ones in PyTorch."""

from __future__ import annotations

import pytest
import torch
from oplevel import ROUNDS, copying, op_info, op_rows, op_table, turns
from rich.table import Table

from eqr_kernels import noise, ops

STREAM = 2
SHAPES = {"sudoku-paper": (8, 81, 512), "sudoku-small": (32, 81, 128)}


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("kind", ["words", "normal"])
@pytest.mark.parametrize("size", SHAPES)
@torch.no_grad()
def test_philox(benchmark, tables: list[Table], quick: bool, size: str, kind: str) -> None:
    if quick and size != "sudoku-small":
        pytest.skip("left out by --quick")
    n, numel = SHAPES[size][0], SHAPES[size][1] * SHAPES[size][2]
    rng = noise.make_rng(0, 0, torch.arange(n), 0)
    if kind == "words":
        assert torch.equal(ops.philox_words(rng, STREAM, numel), noise.philox_words(rng, STREAM, numel))
        candidates = {
            "op": lambda: ops.philox_words(rng, STREAM, numel),
            "eager": lambda: torch.randint(0, 1 << 32, (n, numel)),
            "reference": lambda: noise.philox_words(rng, STREAM, numel),
        }
    else:
        exact = noise.normal(rng, STREAM, (numel,), torch.float64)
        torch.testing.assert_close(ops.philox_normal(rng, STREAM, numel).double(), exact, rtol=2e-5, atol=2e-6)
        candidates = {
            "op": lambda: ops.philox_normal(rng, STREAM, numel),
            "eager": lambda: torch.randn(n, numel),
            "reference": lambda: noise.normal(rng, STREAM, (numel,), torch.float32),
        }
    moved = n * numel * (8 if kind == "words" else 4)  # written only
    rows = op_rows(turns(candidates | {"copy": copying(moved)}, ROUNDS[quick]), "fp32", moved=moved)
    tables.append(op_table(f"philox_{kind}, [{n}, {numel}]", rows))
    benchmark.extra_info.update(op=f"philox_{kind}", shape=[n, numel], **op_info(), rows=rows)
    benchmark.pedantic(candidates["op"], rounds=5, warmup_rounds=1)
