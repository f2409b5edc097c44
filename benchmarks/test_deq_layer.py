"""`ek.FixedPoint` on the layer of examples/deq_classifier.py against an unrolled loop and torchdeq, in fresh processes.

All images in one batch, at one tolerance. Each contender's residual, and its gradient against float64, is looked at
before its time counts; what `phantom` and `last` give is no exact gradient, and their error is a result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import quotients, ratios, spread
from peers.deq_layer import CONTENDERS
from peers.process import started, take_turns
from rich.table import Table

TOL, ROUNDS = 1e-4, {False: 15, True: 7}  # by --quick
OURS, EXACT = "implicit", ("implicit", "implicit, anderson", "unrolled", "torchdeq", "torchdeq anderson")
TIMES = ("forward_s", "both_s")


def test_layer_of_the_classifier(benchmark, tables: list[Table], quick: bool) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    threads = torch.get_num_threads()
    with started("benchmarks.peers.deq_layer", CONTENDERS, threads=threads) as (processes, skipped):
        answers = take_turns(processes, ROUNDS[quick], tol=TOL)
        benchmark.pedantic(processes[OURS].request, kwargs=dict(tol=TOL), rounds=1)
    for name, turns in answers.items():
        assert turns[0]["worst_residual"] <= TOL, name
        assert turns[0]["gradient_error"] <= (1e-3 if name in EXACT else 0.5), name
    assert answers[OURS][0]["kept_bytes"][0] == answers[OURS][0]["kept_bytes"][1], "memory grows with the steps"
    seconds = {key: {name: [turn[key] for turn in turns] for name, turns in answers.items()} for key in TIMES}
    table = Table(title=f"1,797 images, residual {TOL:g}, {threads} threads")
    for column in ("contender", "forward, ms", "and backward", "rows computed", "error of the gradient", "kept, MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    rows = []
    for name, turns in answers.items():
        first = turns[0]
        row: dict[str, Any] = {"contender": name, "peer": name not in CONTENDERS or not name.startswith(OURS)}
        row |= {"rounds": len(turns), **spread("forward_s", seconds["forward_s"][name])}
        row |= spread("both_s", seconds["both_s"][name])
        row |= {key: first[key] for key in ("computed", "worst_residual", "gradient_error", "kept_bytes")}
        if name == OURS:
            others = {
                n: quotients(times, seconds["both_s"][OURS]) for n, times in seconds["both_s"].items() if n != OURS
            }
            row |= ratios(others)
        rows.append(row)
        kept = " / ".join(f"{size / 2**20:.1f}" for size in first["kept_bytes"])
        cells = (f"{row['forward_s'] * 1e3:.1f}", f"{row['both_s'] * 1e3:.1f}", f"{first['computed']:,}")
        table.add_row(name, *cells, f"{first['gradient_error']:.1e}", kept)
    tables.append(table)
    benchmark.extra_info.update(threads=threads, rows=rows, skipped=skipped)
