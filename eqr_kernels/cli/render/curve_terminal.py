"""The map of `eqr curve` as tables for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from eqr_kernels.cli.render import wording

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport

_ROWS_AT_MOST = 14


def draw_curve(report: CurveReport) -> None:
    """The front with its named points, what was run for real, and what to choose."""
    # A log has no width, and eleven columns need one.
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 150)
    console.print(_front(report))
    if report.checked:
        console.print(_checked(report))
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("setting", "why", "") else "right")
    return table


def _front(report: CurveReport) -> Table:
    front, names = report.bend.front, wording.marks(report)
    shown = _spread(front, names)
    cut = "" if len(shown) == len(front) else f" ({len(shown)} of its {len(front)} points; curve.json has all)"
    columns = ["setting", "accuracy", "95 %", "NFE", "p50 ms", "p95 ms", "puzzles/s", f"{report.unit_costs.unit}-s"]
    if report.settings.price:
        columns.append(f"{report.settings.price.currency} per 1,000")
    table = _table(
        f"{report.model}{wording.symmetries(report)}, {report.puzzles.count} puzzles: the Pareto front{cut}",
        *columns,
        "",
    )
    for i in shown:
        p = report.points[i]
        low, high = p.accuracy.interval
        row = [
            wording.setting(p.policy),
            wording.percent(p.accuracy.share),
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{p.nfe:.1f}",
            f"{p.latency_ms[0]:.3g}",
            f"{p.latency_ms[1]:.3g}",
            f"{p.throughput:.3g}",
            f"{p.unit_seconds:.2g}",
        ]
        if p.cost_per_1000 is not None:
            row.append(f"{p.cost_per_1000:.2g}")
        table.add_row(*row, ", ".join(names.get(i, ())))
    return table


def _spread(front: tuple[int, ...], names: dict[int, list[str]]) -> list[int]:
    """At most so many of the front, the named ones always."""
    step = (len(front) - 1) / (_ROWS_AT_MOST - 1)
    few = len(front) <= _ROWS_AT_MOST
    kept = (set(front) if few else {front[round(k * step)] for k in range(_ROWS_AT_MOST)}) | set(names)
    return [i for i in [*front, *sorted(set(names) - set(front))] if i in kept]


def _checked(report: CurveReport) -> Table:
    columns = ("setting", "right", "NFE", "p50 ms", "p95 ms", "p99 ms", "queries", "puzzles/s", "why")
    table = _table("run for real (computed beside it)", *columns)
    for row in report.checked:
        point, run = report.points[row.index], row.run
        table.add_row(
            wording.setting(point.policy),
            f"{run.correct} ({run.computed_correct})",
            f"{run.nfe:.1f} ({run.computed_nfe:.1f})",
            *(f"{real:.3g} ({computed:.3g})" for real, computed in zip(run.latency_ms, run.computed_ms, strict=True)),
            str(run.queries),
            f"{run.throughput:.3g} ({point.throughput:.3g})",
            ", ".join(row.why),
        )
    return table


def _lines(report: CurveReport) -> list[str]:
    lines, bend = [wording.recorded(report)] if wording.recorded(report) else [], report.bend
    best, within = report.points[bend.best], report.points[bend.cheapest_within]
    if not best.accuracy.correct:
        lines.append("no puzzle is answered right at any point of the map; `eqr diagnose` says why")
    elif within is not best:
        lines.append(
            f"the bend: {wording.setting(within.policy)} is within {bend.within_points:g} points of the best "
            f"({100 * within.accuracy.share:.1f} of {100 * best.accuracy.share:.1f} %) for "
            f"{best.nfe / within.nfe:.3g}x fewer outer steps"
        )
    if report.early_exit is None:
        lines.append("the model's card has no tolerance, so early exit at it is left out; `eqr calibrate` finds one")
    else:
        for row in report.early_exit.rows:
            lines.append(
                f"early exit at tol {report.early_exit.tol:.3g}, depth {report.settings.depth}, breadth {row.breadth}: "
                f"{row.nfe_exit:.1f} of {row.nfe_full:.0f} outer steps, {row.times:.2f}x fewer; accuracy "
                f"{100 * row.exit.share:.1f} against {100 * row.full.share:.1f} % (lost {row.lost}, "
                f"gained {row.gained}), {100 * row.settled:.1f} % met it"
            )
    if report.residuals.auroc is not None:
        lines.append(f"residual and correctness at depth {report.settings.depth}: AUROC {report.residuals.auroc:.3f}")
    recommended = report.recommendation
    if recommended and recommended.index is not None:
        policy = report.points[recommended.index].policy
        lines += [recommended.reason, wording.call(report, policy, recommended.arguments)]
    return lines
