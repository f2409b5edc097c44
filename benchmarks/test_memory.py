"""Memory does not grow with depth: peak RSS of a fresh process that solves at depth 16, and of one at depth 1024.

The bytes that a trajectory in flight takes are printed too: they and `slots` are what memory does grow with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import spread
from peers.process import Process
from rich.table import Table

from eqr_kernels.tasks import sudoku_generator

MODEL, ROWS = "sudoku-small", 8
SHALLOW, DEEP = 16, {False: 1024, True: 256}  # by --quick


@pytest.fixture(scope="module")
def info() -> dict[str, Any]:
    """What the cpu backend can run here, and the bytes that it takes."""
    threads = torch.get_num_threads()
    with Process("benchmarks.peers.solver", MODEL, "--info", threads=threads) as process:
        return process.info


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_memory(benchmark, tables: list[Table], quick: bool, info: dict[str, Any], precision: str) -> None:
    threads, depth = torch.get_num_threads(), DEEP[quick]
    arguments = ("benchmarks.peers.solver", MODEL, "--threads", str(threads))
    if info["cpu"][precision] is not None:
        pytest.skip(info["cpu"][precision])
    tokens = sudoku_generator.generate(ROWS, "hard", seed=1).inputs.tolist()
    options = dict(backend="cpu", precision=precision, halt="none", slots=ROWS)

    def peak_rss(depth: int) -> int:
        with Process(*arguments, threads=threads) as process:
            answer = process.request(tokens=tokens, options=dict(options, depth=depth))
        assert answer["backend"] == "cpu" and answer["nfe"] == ROWS * depth
        return int(answer["peak_rss"])

    shallow, deep = peak_rss(SHALLOW), peak_rss(depth)
    again = benchmark.pedantic(peak_rss, args=(SHALLOW,), rounds=1)
    growth = deep / shallow - 1
    table = Table("precision", "depth", "peak RSS", title=f"{MODEL}, {ROWS} in flight, {threads} threads", min_width=60)
    for steps, rss in ((SHALLOW, shallow), (SHALLOW, again), (depth, deep)):
        table.add_row(precision, str(steps), f"{rss / 2**20:.2f} MiB")
    table.caption = f"{growth:+.2%}; a trajectory in flight takes {info['trajectory_bytes'][precision]:,} bytes"
    tables.append(table)
    benchmark.extra_info.update(
        model=MODEL,
        precision=precision,
        threads=threads,
        in_flight=ROWS,
        depths=[SHALLOW, depth],
        peak_rss=[shallow, deep],
        peak_rss_again=again,
        growth=round(growth, 5),
        goal=0.01,
        trajectory_bytes=info["trajectory_bytes"][precision],
        packed_bytes=info["packed_bytes"][precision],
        rows=[_row(precision, SHALLOW, info, [shallow, again]), _row(precision, depth, info, [deep])],
    )
    assert abs(growth) < 0.01, f"peak RSS is {shallow} bytes at depth {SHALLOW} and {deep} at depth {depth}"


def _row(precision: str, depth: int, info: dict[str, Any], peaks: list[int]) -> dict[str, Any]:
    """Bytes at one depth: the peak of each process, and what was computed."""
    peak = {"peak_rss": peaks[0]} if len(peaks) == 1 else spread("peak_rss", [float(p) for p in peaks])
    exact = {key: info[key][precision] for key in ("trajectory_bytes", "packed_bytes")}
    return {"run": f"depth {depth}", "precision": precision, "depth": depth, "rounds": len(peaks), **peak, **exact}
