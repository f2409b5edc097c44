"""The tables and the picture of docs/serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.servers import SERVERS
from benchmarks.serving.workload import EASY, HARD
from eqr_kernels.cli.render import style


def print_tables(report: dict[str, Any]) -> None:
    """GitHub's tables of what was measured."""
    console = Console(width=160)
    load = Table("server", "load", "offered/s", "easy p50 ms", "p95", "p99", "hard p99 ms", "goodput/s", "unanswered")
    for row in report["offered"]:
        easy, hard = row["latency"][EASY], row["latency"][HARD]
        numbers = [f"{1000 * easy[p]:,.0f}" for p in ("p50", "p95", "p99")] + [f"{1000 * hard['p99']:,.0f}"]
        load.add_row(
            row["server"],
            f"{100 * row['load']:.0f} %",
            f"{row['offered_per_second']:.2f}",
            *numbers,
            f"{row['goodput_per_second']:.2f}",
            str(row["unanswered"]),
        )
    console.print(load)
    full = Table("server", "answers/s at saturation", "outer steps/s")
    for name, row in report["saturation"].items():
        full.add_row(name, f"{row['requests_per_second']:.2f}", f"{row['steps_per_second']:.0f}")
    console.print(full)
    fleet = Table("machines", "offered/s", "p50 ms", "p99 ms", "price per 1,000")
    for row in report["scaling"]:
        numbers = [f"{row['offered_per_second']:,.1f}", *(f"{1000 * row[p]:,.0f}" for p in ("p50", "p99"))]
        fleet.add_row(f"{row['machines']:,}", *numbers, f"{row['price_per_1000']:.4f}")
    console.print(fleet)


def draw(report: dict[str, Any], path: Path) -> None:
    """Latency of easy requests, and goodput, against the offered load."""
    style.require()
    from matplotlib.figure import Figure

    with style.styled():
        figure = Figure(figsize=(style.WIDTH, 3.6), layout="constrained")
        latency, goodput = figure.subplots(1, 2)
        for name, color, marker in zip(SERVERS, style.SERIES, style.SERIES_MARKERS, strict=False):
            rows = sorted((r for r in report["offered"] if r["server"] == name), key=lambda r: r["offered_per_second"])
            offered = [r["offered_per_second"] for r in rows]
            p99 = [r["latency"][EASY]["p99"] for r in rows]
            latency.plot(offered, p99, color=color, marker=marker, label=name)
            goodput.plot(offered, [r["goodput_per_second"] for r in rows], color=color, marker=marker)
        full = report["saturation"][SERVERS[0]]["requests_per_second"]
        for axes in (latency, goodput):
            axes.axvline(full, linestyle=":", color="gray")
            axes.set_xlabel("requests offered a second")
        latency.annotate("saturation", (full, 1), (3, -4), ("data", "axes fraction"), "offset points", va="top")
        latency.set_yscale("log")
        style.plain_ticks(latency.yaxis, log=True)
        latency.set_ylabel("p99 of easy requests (s)")
        goodput.set_ylabel(f"answers within {report['deadline']:g} s (a second)")
        figure.legend(loc="outside upper center", ncols=len(SERVERS), frameon=False)
        path.write_bytes(style.save(figure, path.suffix[1:]))
