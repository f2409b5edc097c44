"""An outer step of the CPU kernel: milliseconds a trajectory-step, share of the registers' peak, ratio to each peer.

This is the op `fixed_point` through `solve`; test_fixed_point.py times the op by itself. Every contender, the reference
backend among them, has a process of its own, freshly started; it checks its output against the float64 reference before
it times anything, and the processes take turns, the meter of the peak among them. A wrong result fails; slowness does
not. Goals are recorded beside what was measured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import PRECISIONS, Field, main_precision
from peers import BASELINE, PEERS
from rich.table import Table

ROUNDS = {False: 7, True: 5}  # by --quick
QUICK = {("sudoku-paper", 1): [BASELINE, "eager-precast"], ("sudoku-small", 8): [BASELINE]}  # peers
DEPTH = 4  # of the solve that pytest-benchmark times by itself


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", ["sudoku-paper", "maze", "sudoku-small"])
def test_outer_step(benchmark, tables: list[Table], quick: bool, preset: str, batch: int) -> None:
    if quick and (preset, batch) not in QUICK:
        pytest.skip("left out by --quick")
    peers = ["reference", *(QUICK[preset, batch] if quick else PEERS)]
    with Field(preset, batch, torch.get_num_threads(), list(PRECISIONS), peers) as field:
        ours = field.find("cpu", main_precision())
        if ours.process is None:
            pytest.skip(ours.info["skipped"])
        field.take_turns(ROUNDS[quick])
        rows = field.rows()
        tables.append(table(preset, batch, rows))
        benchmark.extra_info.update(preset=preset, batch=batch, baseline=BASELINE, solve_depth=DEPTH, rows=rows)
        benchmark.pedantic(ours.process.request, kwargs={"query": DEPTH}, rounds=1 if quick else 3, warmup_rounds=1)


def table(preset: str, batch: int, rows: list[dict[str, Any]]) -> Table:
    """A line for each contender; the last columns say how many times as fast as it our precisions are."""
    ours = {row["precision"]: row for row in rows if row["contender"] == "cpu"}
    compared = [p for p in ours if ours[p].get("times_as_fast_as")]
    peaks = ours[main_precision()].get("peak_gop_per_s", {})
    shown = Table(title=f"{preset}, batch {batch}, {rows[0]['threads']} threads")
    shown.caption = "peak: " + (
        ", ".join(
            f"{p} {g['median']:.0f} ({g['median_p20']:.0f}-{g['median_p80']:.0f}) Gop/s" for p, g in peaks.items()
        )
        or "not measured"
    )
    shown.add_column("contender")
    for name in ("ms a trajectory-step", "its 20-80 %", "share of peak", *(f"cpu {p} is faster" for p in compared)):
        shown.add_column(name, justify="right")
    for row in rows:
        label = f"{row['contender']} {row['precision']}"
        if "ms_per_trajectory_step" not in row:
            reason = row.get("skipped", "not measured").splitlines()[-1]
            shown.add_row(label, "-", reason if len(reason) < 60 else reason[:57] + "...")
            continue
        wanted = row.get("goal", {})
        share = f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else "-"
        if "share_of_peak" in wanted:
            share += f" (goal {wanted['share_of_peak']:.0%})"
        ratios = []
        for precision in compared:
            ratio = ours[precision]["times_as_fast_as"].get(row["contender"])
            goal = ours[precision].get("goal", {}).get("times_as_fast") if row["contender"] == BASELINE else None
            ratios.append("" if ratio is None else f"{ratio:.2f}x" + (f" (goal {goal}x)" if goal else ""))
        low, high = row["ms_per_trajectory_step_p20"], row["ms_per_trajectory_step_p80"]
        shown.add_row(label, f"{row['ms_per_trajectory_step']:.2f}", f"{low:.2f}-{high:.2f}", share, *ratios)
    return shown
