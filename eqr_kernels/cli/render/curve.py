"""The map of `eqr curve` as tables for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_MOST_ROWS = 14


def curve(report: dict[str, Any]) -> None:
    """The front with its named points, what was run for real, and what to choose."""
    # A log has no width, and eleven columns need one.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(_front(report))
    if report["checked"]:
        console.print(_checked(report))
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)


def policy(point: dict[str, Any]) -> str:
    """A point's setting in a few words, as in "residual 0.028, depth 64, breadth 8"."""
    tol = "" if point["tol"] is None else f" {point['tol']:.3g}"
    return f"{point['policy']}{tol}, depth {point['depth']}, breadth {point['breadth']}"


def _front(report: dict[str, Any]) -> Table:
    points, front, names = report["points"], report["front"], _names(report)
    shown = _spread(front, names)
    cut = "" if len(shown) == len(front) else f" ({len(shown)} of its {len(front)} points; curve.json has all)"
    table = Table(title=f"{report['model']}, {report['puzzles']['count']} puzzles: the Pareto front{cut}")
    unit = report["unit_costs"]["unit"]
    price = report["settings"]["price"]
    columns = ["setting", "accuracy", "95 %", "NFE", "p50 ms", "p95 ms", "puzzles/s", f"{unit}-s"]
    if price:
        columns.append(f"{price['currency']} per 1,000")
    for name in [*columns, ""]:
        table.add_column(name, justify="left" if name in ("setting", "") else "right")
    for i in shown:
        p = points[i]
        low, high = p["accuracy"]["wilson95"]
        row = [
            policy(p),
            f"{100 * p['accuracy']['share']:.1f} %",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{p['nfe']:.1f}",
            f"{p['latency_ms']['p50']:.3g}",
            f"{p['latency_ms']['p95']:.3g}",
            f"{p['throughput']:.3g}",
            f"{p[unit.lower() + '_seconds']:.2g}",
        ]
        if price:
            row.append(f"{p['cost_per_1000']:.2g}")
        table.add_row(*row, ", ".join(names.get(i, ())))
    return table


def _names(report: dict[str, Any]) -> dict[int, list[str]]:
    bend = report["bend"]
    told: dict[int, list[str]] = {}
    within = bend["cheapest_within"]
    named = [("knee", bend["knee"]), (f"within {within['points']:g} points of the best", within["index"])]
    named.append(("best", bend["best"]))
    if report["recommendation"]:
        named.append(("recommended", report["recommendation"]["index"]))
    for name, index in named:
        if index is not None:
            told.setdefault(index, []).append(name)
    return told


def _spread(front: list[int], names: dict[int, list[str]]) -> list[int]:
    """At most so many of the front, the named ones always."""
    few = len(front) <= _MOST_ROWS
    step = (len(front) - 1) / (_MOST_ROWS - 1)
    kept = (set(front) if few else {front[round(k * step)] for k in range(_MOST_ROWS)}) | set(names)
    return [i for i in [*front, *sorted(set(names) - set(front))] if i in kept]


def _checked(report: dict[str, Any]) -> Table:
    table = Table(title="run for real (computed beside it)")
    for name in ("setting", "right", "NFE", "p50 ms", "p95 ms", "p99 ms", "queries", "puzzles/s", "why"):
        table.add_column(name, justify="left" if name in ("setting", "why") else "right")
    for row in report["checked"]:
        point = report["points"][row["index"]]
        measured, computed = row["latency_ms"], row["latency_ms_computed"]
        table.add_row(
            policy(point),
            f"{row['correct']} ({row['correct_computed']})",
            f"{row['nfe']:.1f} ({row['nfe_computed']:.1f})",
            *(f"{measured[q]:.3g} ({computed[q]:.3g})" for q in ("p50", "p95", "p99")),
            str(row["queries"]),
            f"{row['throughput']:.3g} ({point['throughput']:.3g})",
            ", ".join(row["why"]),
        )
    return table


def _lines(report: dict[str, Any]) -> list[str]:
    told, points, bend = [], report["points"], report["bend"]
    best, within = points[bend["best"]], points[bend["cheapest_within"]["index"]]
    if not best["accuracy"]["correct"]:
        told.append("no puzzle is answered right at any point of the map; `eqr diagnose` says why")
    elif within is not best:
        told.append(
            f"the bend: {policy(within)} is within {bend['cheapest_within']['points']:g} points of the best "
            f"({100 * within['accuracy']['share']:.1f} of {100 * best['accuracy']['share']:.1f} %) for "
            f"{best['nfe'] / within['nfe']:.3g}x fewer outer steps"
        )
    savings = report["savings"]
    if savings is None:
        told.append(
            "the model's card has no tolerance, so what early exit saves is not told; `eqr calibrate` finds one"
        )
    else:
        for row in savings["rows"]:
            told.append(
                f"early exit at tol {savings['tol']:.3g}, depth {row['depth']}, breadth {row['breadth']}: "
                f"{row['nfe_exit']:.1f} of {row['nfe_full']:.0f} outer steps, {row['times']:.2f}x fewer; accuracy "
                f"{100 * row['accuracy_exit']:.1f} against {100 * row['accuracy_full']:.1f} % (lost {row['lost']}, "
                f"gained {row['gained']}), {100 * row['settled']:.1f} % settled"
            )
    auroc = report["coupling"]["auroc"]
    if auroc is not None:
        told.append(f"residual and correctness at depth {report['coupling']['depth']}: AUROC {auroc:.3f}")
    recommended = report["recommendation"]
    if recommended and recommended["arguments"]:
        told += [recommended["reason"], f"model.solve(tokens, {recommended['arguments']})"]
    return told
