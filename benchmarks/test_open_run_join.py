"""The op open_run_join: puzzles that join an open run one by one and take turns in it, against one call of fixed_point
for all of them.

The difference is what joining, turns and handing over cost, the parking of states included.
"""

from __future__ import annotations

import pytest
import torch
from oplevel import ROUNDS, full_depth, op_info, op_rows, op_table, turns
from peers.workload import Workload
from rich.table import Table
from torch import Tensor

from eqr_kernels import noise, ops
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.ops import Done
from eqr_kernels.precision import Precision

PUZZLES, DEPTH = 8, 12


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
@pytest.mark.parametrize("puzzles", [1, PUZZLES])
@torch.no_grad()
def test_open_run_join(benchmark, tables: list[Table], quick: bool, puzzles: int) -> None:
    model = Workload("sudoku-small", puzzles).model
    packed = PackArguments.of(model).pack(Precision.fp32)
    tokens = torch.randint(1, 11, (puzzles, model.config.seq_len), generator=torch.Generator().manual_seed(0))
    ids = noise.hash_tokens(tokens)
    rules = full_depth(DEPTH, model.config.noise_scale, slots=64)
    run = ops.OpenRun(threads=torch.get_num_threads(), quantum=4, in_flight=256, policy="least_service")
    try:

        def joined() -> list[Tensor]:
            kept = []
            for n in range(puzzles):
                given = tokens[n : n + 1], ids[n : n + 1], torch.zeros(3, dtype=torch.int64)
                kept.append((given, run.join(packed, *given, rules, number=n)))
            left = puzzles
            while left:
                left -= sum(isinstance(event, Done) for event in run.take())
            return [output.logits for _, output in kept]

        def together() -> Tensor:
            return ops.fixed_point(packed, tokens, ids, torch.zeros(3, dtype=torch.int64), rules).logits

        assert torch.equal(torch.cat(joined()), together())
        rows = op_rows(turns({"op": joined, "fixed_point": together}, ROUNDS[quick]), "fp32")
        tables.append(op_table(f"open_run_join, {puzzles} puzzles of sudoku-small, {DEPTH} outer steps each", rows))
        benchmark.extra_info.update(op="open_run_join", puzzles=puzzles, depth=DEPTH, **op_info(), rows=rows)
        benchmark.pedantic(joined, rounds=5, warmup_rounds=1)
    finally:
        run.close()
