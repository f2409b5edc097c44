"""The op fixed_point by itself: one call of a few outer steps, without what `solve` does around it.

Logits are checked against the float64 reference before anything is timed. test_outer_step.py and test_solve.py time the
same op through `solve`, in fresh processes, with all peers; here calls are short, so that what a call costs shows.
"""

from __future__ import annotations

import pytest
import torch
from measure import PRECISIONS, main_precision, share_of_peak
from oplevel import ROUNDS, Peak, full_depth, op_info, op_rows, op_table, turns
from peers.contenders import Solving, check
from peers.eager import EagerStep
from peers.workload import DTYPES, PRESETS, Workload, has_bf16, operations
from rich.table import Table
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.precision import Precision

DEPTH = 4
BATCHES = [1, 8]


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_fixed_point(benchmark, tables: list[Table], quick: bool, batch: int, precision: str) -> None:
    if quick and batch != 1:
        pytest.skip("left out by --quick")
    preset = "sudoku-small"
    work = Workload(preset, batch)
    errors = check(Solving("cpu", work, precision), precision)
    model, ids = work.model, torch.arange(batch)
    packed, noise_scale = PackArguments.of(model).pack(Precision[precision]), model.config.noise_scale
    theirs = precision if precision == "fp32" or (precision == "bf16" and has_bf16()) else main_precision()
    step, scale = EagerStep(model, DTYPES[theirs], DTYPES[theirs]), torch.full((), noise_scale)
    state = model.initial_state(batch, ids=ids)
    start = state.z_H.to(DTYPES[theirs]), state.z_L.to(DTYPES[theirs])

    rules = full_depth(DEPTH, noise_scale, slots=batch)

    def op() -> Tensor:
        return ops.fixed_point(
            packed,
            work.tokens,
            ids,
            torch.zeros(3, dtype=torch.int64),
            rules,
        ).logits

    def eager() -> Tensor:
        z_H, z_L = start
        for _ in range(DEPTH):
            z_H, z_L, logits, _ = step(z_H, z_L, work.tokens, scale)
        return logits

    same = model.solve(work.tokens, depth=DEPTH, halt="none", backend="cpu", precision=precision, ids=ids)
    assert torch.equal(op(), same.logits), "the op does not give what solve gives, which was checked"
    meter = Peak(("bf16", "int8") if precision == "int8" else (precision,))
    times = turns({"op": op, "eager": eager, **meter.candidate}, ROUNDS[quick])
    cost = operations(PRESETS[preset]())
    floor = [batch * DEPTH * share_of_peak(cost, precision, rates, 1.0) for rates in meter.of(ROUNDS[quick])]
    rows = op_rows(times, precision, floor=floor)
    tables.append(op_table(f"fixed_point, {preset}, batch {batch}, depth {DEPTH}, eager in {theirs}", rows))
    benchmark.extra_info.update(
        op="fixed_point",
        preset=preset,
        batch=batch,
        depth=DEPTH,
        eager_precision=theirs,
        meter=meter.missing,
        trajectory_bytes=ops.trajectory_bytes(packed),
        **op_info(),
        **errors,
        rows=rows,
    )
    benchmark.pedantic(op, rounds=5, warmup_rounds=1)
