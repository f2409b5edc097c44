"""`fixed_point` on rows of uneven difficulty against plain and compiled loops and torchdeq, each in a fresh process.

The truth is known, and every contender's answer is judged by it before its time counts. What a row needs is the steps
that it takes alone; `applications` is how many times as many rows a contender's steps compute in all.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from measure import quotients, ratios, spread
from peers.process import started, take_turns
from peers.rows import CONTENDERS, DEPTH, Problem
from rich.table import Table

from eqr_kernels import fixed_point

TOL, ROUNDS = 1e-4, {False: 5, True: 3}  # by --quick


def needed() -> int:
    """Steps of all rows, each taken alone at the tolerance."""
    p = Problem()
    return int(fixed_point(p.step, p.z0, p.rate, p.target, depth=DEPTH, tol=TOL).steps.sum())


def test_uneven_rows(benchmark, tables: list[Table], quick: bool) -> None:
    threads = torch.get_num_threads()
    with started("benchmarks.peers.rows", CONTENDERS, threads=threads) as (processes, skipped):
        answers = take_turns(processes, ROUNDS[quick], tol=TOL)
        benchmark.pedantic(processes["eqr"].request, kwargs=dict(tol=TOL), rounds=1)
    for name in ("eqr", "eqr anderson", "loop", "loop compiled"):
        assert max(answers[name][0]["residual"]) <= TOL, name
    seconds = {name: [turn["seconds"] for turn in turns] for name, turns in answers.items()}
    steps = needed()
    rows = [_row(name, turns, seconds, steps) for name, turns in answers.items()]
    table = Table(title=f"512 rows of rates 0.1 to 0.99, residual {TOL:g}, {threads} threads")
    for column in ("contender", "seconds", "times as fast is eqr", "applications / needed", "worst residual", "error"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        slower = statistics.median(quotients(seconds[row["contender"]], seconds["eqr"]))
        cells = (f"{row['s']:.3f}", f"{slower:.2f}", f"{row['applications']:.3f}", f"{row['worst_residual']:.1e}")
        table.add_row(row["contender"], *cells, f"{row['error']:.1e}")
    tables.append(table)
    benchmark.extra_info.update(
        threads=threads, rows=rows, skipped=skipped, goal={"times_as_fast": 3, "applications": 1.1}
    )


def _row(name: str, turns: list[dict[str, Any]], seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    others = {other: quotients(times, seconds[name]) for other, times in seconds.items() if other != name}
    return {
        "contender": name,
        "peer": not name.startswith("eqr"),
        "rounds": len(turns),
        **spread("s", seconds[name]),
        "applications": round(turns[0]["computed"] / steps, 4),
        "worst_residual": max(turns[0]["residual"]),
        "error": turns[0]["error"],
        "peak_rss": turns[0]["peak_rss"],
        **(ratios(others) if name == "eqr" else {}),
    }


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
