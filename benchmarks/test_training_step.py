"""A whole training step on the CPU, with optimizer and averages: time, samples/s, share of the registers' peak, ratios.

Every contender has a process of its own, freshly started; it checks its gradients against float64 autograd of the
reference before it times anything, and the processes take turns, the meter of the peak among them. Wrong gradients
fail; slowness does not. The goal is recorded beside what was measured.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from measure import Contender, Field, spread
from peers.trainer import CONTENDERS
from peers.workload import PRESETS, has_bf16
from rich.table import Table

from eqr_kernels.commands.training_rate import training_operations

OURS, BASELINE = "fused", "compile"
BATCHES = {"sudoku-small": 96, "sudoku": 16}
ROUNDS = {False: 7, True: 3}  # by --quick
GOAL = {"share_of_peak": 0.5}


class TrainingField(Field):
    """The contenders of `peers.trainer` for one preset."""

    ours = frozenset({OURS})

    def __init__(self, preset: str, threads: int, names: list[str]) -> None:
        super().__init__(preset, BATCHES[preset], threads, [], [])
        self.sample = training_operations(PRESETS[preset]())
        self.wanted = [("meter", "all"), *((name, CONTENDERS[name][0]) for name in names)]

    def _command(self, name: str, precision: str) -> list[str]:
        if name == "meter":
            return super()._command(name, precision)
        return ["benchmarks.peers.trainer", name]

    def _row(self, contender: Contender) -> dict[str, Any]:
        row: dict[str, Any] = {key: value for key, value in contender.about.items() if key != "dtype"}
        row |= {"contender": contender.name, "precision": contender.precision, "threads": self.threads}
        row |= {"preset": self.preset, "batch": self.batch}
        if not contender.turns:
            return row
        row |= spread("ms_per_step", [1e3 * seconds for seconds in contender.seconds()])
        row |= spread("samples_per_s", [self.batch / seconds for seconds in contender.seconds()])
        if contender.name == OURS:
            row["times_as_fast_as"] = self._ratios(contender)
            row["goal"], row["goal_is_for_this_machine"] = GOAL, has_bf16() and self.threads == 2
        return row

    def _ratios(self, ours: Contender) -> dict[str, float]:
        """Of each round, the median."""
        ratios = {}
        for peer in self.contenders:
            if peer.name not in (OURS, "meter") and peer.turns:
                pairs = zip(peer.seconds(), ours.seconds(), strict=True)
                ratios[peer.name] = round(statistics.median(theirs / mine for theirs, mine in pairs), 3)
        return ratios

    def _share(self, contender: Contender, peaks: list[dict[str, float]]) -> dict[str, Any]:
        rates = [self.sample * self.batch / seconds for seconds in contender.seconds()]
        mine = [peak[contender.precision] for peak in peaks]
        return {
            "gop_per_sample": round(self.sample / 1e9, 4),
            "peak_gop_per_s": spread("median", [peak / 1e9 for peak in mine]),
            **spread("gop_per_s", [rate / 1e9 for rate in rates]),
            **spread("share_of_peak", [rate / peak for rate, peak in zip(rates, mine, strict=True)]),
        }


@pytest.mark.parametrize("preset", BATCHES)
def test_training_step(benchmark, tables: list[Table], quick: bool, preset: str) -> None:
    if quick and preset != "sudoku-small":
        pytest.skip("left out by --quick")
    names = [OURS, BASELINE, "eager"] if quick else list(CONTENDERS)
    with TrainingField(preset, torch.get_num_threads(), names) as field:
        ours = field.find(OURS, "bf16")
        if ours.process is None:
            pytest.skip(ours.about["skipped"])
        field.take_turns(ROUNDS[quick])
        rows = field.rows()
        tables.append(table(preset, rows))
        benchmark.extra_info.update(preset=preset, batch=field.batch, baseline=BASELINE, rows=rows)
        benchmark.pedantic(ours.process.request, rounds=3)


def table(preset: str, rows: list[dict[str, Any]]) -> Table:
    """A line for each contender; the last column says how many times as fast as it the fused step is."""
    ours = next(row for row in rows if row["contender"] == OURS)
    shown = Table(title=f"training step of {preset}, {BATCHES[preset]} rows, {ours['threads']} threads")
    peaks = {row["precision"]: row["peak_gop_per_s"] for row in rows if "peak_gop_per_s" in row}
    shown.caption = "peak: " + ", ".join(
        f"{p} {g['median']:.0f} ({g['median_p20']:.0f}-{g['median_p80']:.0f}) Gop/s" for p, g in peaks.items()
    )
    shown.add_column("contender")
    for name in ("ms a step", "its 20-80 %", "samples/s", "Gop/s", "share of peak", "fused is faster"):
        shown.add_column(name, justify="right")
    for row in rows:
        label = f"{row['contender']} {row['precision']}"
        if "ms_per_step" not in row:
            reason = row.get("skipped", "not measured").splitlines()[-1]
            shown.add_row(label, "-", reason if len(reason) < 60 else reason[:57] + "...")
            continue
        share = f"{row['share_of_peak']:.1%}"
        if "goal" in row:
            share += f" (goal {row['goal']['share_of_peak']:.0%})"
        ratio = ours["times_as_fast_as"].get(row["contender"])
        shown.add_row(
            label,
            f"{row['ms_per_step']:.0f}",
            f"{row['ms_per_step_p20']:.0f}-{row['ms_per_step_p80']:.0f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['gop_per_s']:.0f}",
            share,
            "" if ratio is None else f"{ratio:.2f}x",
        )
    return shown
