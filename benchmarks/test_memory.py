"""Memory does not grow with depth: peak RSS of a fresh process that solves at depth 16, and of one at depth 1024.

The bytes that a trajectory in flight takes are printed too: they and `slots` are what memory does grow with.
"""

from __future__ import annotations

import pytest
import torch
from peers.process import Process
from rich.table import Table

from eqr_kernels.tasks import sudoku_generator

MODEL, ROWS = "sudoku-small", 8
SHALLOW, DEEP = 16, 1024


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_memory(benchmark, tables: list[Table], quick: bool, precision: str) -> None:
    if quick and precision != "bf16":
        pytest.skip("left out by --quick")
    threads = torch.get_num_threads()
    arguments = ("benchmarks.peers.solver", MODEL, "--threads", str(threads))
    with Process(*arguments, "--about", threads=threads) as process:
        about = process.about
    if about["cpu"][precision] is not None:
        pytest.skip(about["cpu"][precision])
    tokens = sudoku_generator.generate(ROWS, "hard", seed=1).inputs.tolist()
    options = dict(backend="cpu", precision=precision, halt="none", slots=ROWS)

    def peak_rss(depth: int) -> int:
        with Process(*arguments, threads=threads) as process:
            answer = process.request(tokens=tokens, options=dict(options, depth=depth))
        assert answer["backend"] == "cpu" and answer["nfe"] == ROWS * depth
        return int(answer["peak_rss"])

    shallow, deep = peak_rss(SHALLOW), peak_rss(DEEP)
    again = benchmark.pedantic(peak_rss, args=(SHALLOW,), rounds=1)
    growth = deep / shallow - 1
    table = Table("precision", "depth", "peak RSS", title=f"{MODEL}, {ROWS} in flight, {threads} threads", min_width=60)
    for depth, rss in ((SHALLOW, shallow), (SHALLOW, again), (DEEP, deep)):
        table.add_row(precision, str(depth), f"{rss / 2**20:.2f} MiB")
    table.caption = f"{growth:+.2%}; a trajectory in flight takes {about['trajectory_bytes'][precision]:,} bytes"
    tables.append(table)
    benchmark.extra_info.update(
        model=MODEL,
        precision=precision,
        threads=threads,
        rows=ROWS,
        depths=[SHALLOW, DEEP],
        peak_rss=[shallow, deep],
        peak_rss_again=again,
        growth=round(growth, 5),
        goal=0.01,
        trajectory_bytes=about["trajectory_bytes"][precision],
        packed_bytes=about["packed_bytes"][precision],
    )
    assert abs(growth) < 0.01, f"peak RSS is {shallow} bytes at depth {SHALLOW} and {deep} at depth {DEEP}"
