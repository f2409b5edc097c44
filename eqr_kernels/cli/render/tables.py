"""The tables of a curve report, cell by cell as text; what was not measured is an empty cell, never an estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eqr_kernels.cli.render import wording

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport
    from eqr_kernels.studies.points import Point


@dataclass(frozen=True)
class Row:
    """Cells in the order of the columns; `strong` for a row that the report singles out."""

    cells: list[str]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first `words` columns hold words and the others numbers.

    `rows` may be empty: then `absent` says why.
    """

    anchor: str
    title: str
    caption: str
    columns: list[str]
    words: int
    rows: list[Row] = field(default_factory=list)
    absent: str = ""


def tables(report: CurveReport) -> list[Table]:
    """All tables, in the order in which they are shown."""
    return [_front(report), _checked(report), _latency(report), _memory(report), _rates(report), _savings(report)]


_POINT_COLUMNS = [
    "",
    "policy",
    "depth",
    "breadth",
    "tol",
    "accuracy",
    "95 % interval",
    "NFE",
    "layer equivalents",
    "p50, ms",
    "p95, ms",
    "p99, ms",
    "puzzles/s",
]


def _front(report: CurveReport) -> Table:
    points, named = report.points, wording.marks(report)
    shown = sorted({*report.bend.front, *named}, key=lambda i: (points[i].unit_seconds, points[i].accuracy.share))
    costs = [wording.unit_seconds(report), f"{wording.currency(report) or 'money'} per 1000", "joules", "memory, MiB"]
    return Table(
        anchor="front",
        title="The Pareto front",
        caption="By rising cost. Every row is more accurate than all cheaper ones; points that the report singles out "
        "are in bold, and are listed even where they are not on the front.",
        columns=[*_POINT_COLUMNS, *costs],
        words=2,
        rows=[Row(_point(report, points[i], named.get(i, [])), i in named) for i in shown],
    )


def _point(report: CurveReport, p: Point, names: list[str]) -> list[str]:
    # A race of views holds one at a time.
    held = 1 if report.settings.views and p.policy.select == "first" else p.policy.breadth
    measured = (p.nfe, p.nfe * report.layers_per_step, *p.latency_ms, p.throughput, p.unit_seconds, p.cost_per_1000)
    return [
        ", ".join(names),
        wording.LABELS[p.policy.name],
        f"{p.policy.depth:,}",
        f"{p.policy.breadth:,}",
        wording.tolerance(p.policy.tol),
        wording.percent(p.accuracy.share),
        wording.interval(p.accuracy.interval),
        *(wording.significant(value) for value in (*measured, p.joules)),
        wording.mebibytes(report.unit_costs.peak_bytes(p.policy.depth, held)),
    ]


def _checked(report: CurveReport) -> Table:
    rows = []
    for row in report.checked:
        point, run = report.points[row.index], row.run
        rows.append(
            [
                wording.setting(point.policy),
                ", ".join(row.why),
                *(f"{count:,}" for count in (run.puzzles, run.queries, run.computed_correct, run.correct)),
                *(wording.significant(value) for value in (run.computed_nfe, run.nfe, run.computed_ms[0])),
                *(wording.significant(value) for value in run.latency_ms),
                f"{100 * run.latency_error:+.1f} %",
                wording.significant(point.throughput),
                wording.significant(run.throughput),
            ]
        )
    return Table(
        anchor="checked",
        title="Points that were run for real",
        caption="What was computed for a point, and what a run of it on the same puzzles gave. The error of the "
        "latency is (computed − measured) / measured, of the median.",
        columns=[
            "point",
            "why",
            "puzzles",
            "queries alone",
            "right, computed",
            "right, run",
            "NFE, computed",
            "NFE, run",
            "p50, computed, ms",
            "p50, run, ms",
            "p95, run, ms",
            "p99, run, ms",
            "error of p50",
            "puzzles/s, computed",
            "puzzles/s, run",
        ],
        words=2,
        rows=[Row(cells) for cells in rows],
        absent="No point was run for real in this report.",
    )


def _latency(report: CurveReport) -> Table:
    latency = report.unit_costs.latency
    return Table(
        anchor="latency",
        title="Time of one query",
        caption="At each breadth: what a query takes before its first outer step, and for each outer step of one "
        "trajectory (NFE).",
        columns=["breadth", "overhead, ms", "ms per NFE"],
        words=0,
        rows=[
            Row([f"{x.breadth:,}", wording.significant(x.overhead_ms), wording.significant(x.ms_per_nfe)])
            for x in latency
        ],
        absent="It was not measured in this report.",
    )


def _memory(report: CurveReport) -> Table:
    costs = report.unit_costs
    breadths = sorted({m.breadth for m in costs.memory})
    return Table(
        anchor="memory",
        title="Memory of a solve, MiB",
        caption="The peak above what the process held before.",
        columns=["depth", *(f"breadth {b}" for b in breadths)],
        words=0,
        rows=[
            Row([str(depth), *(wording.mebibytes(costs.peak_bytes(depth, b)) for b in breadths)])
            for depth in sorted({m.depth for m in costs.memory})
        ],
        absent="It was not measured in this report.",
    )


def _rates(report: CurveReport) -> Table:
    costs, energy = report.unit_costs, report.unit_costs.energy
    joules, watts = map(wording.significant, (energy.joules_per_nfe, energy.watts) if energy else (None, None))
    rates = [
        ("trajectories in a call, for saturation", f"{costs.trajectories:,}"),
        ("ms per NFE at saturation", wording.significant(costs.ms_per_nfe)),
        (
            f"joules per NFE{f' ({energy.source})' if energy else ''}",
            wording.significant(energy.joules_per_nfe if energy else None),
        ),
        ("watts", wording.significant(energy.watts if energy else None)),
        ("layers an outer step", f"{report.layers_per_step:,}"),
    ]
    return Table(
        anchor="rates",
        title="Other unit costs",
        caption="Throughput, the cost of a query and its energy are computed from these.",
        columns=["what", "value"],
        words=1,
        rows=[Row(list(pair)) for pair in rates],
    )


def _savings(report: CurveReport) -> Table:
    early = report.early_exit
    rows = [
        [
            f"{row.breadth:,}",
            *(wording.significant(value) for value in (row.nfe_full, row.nfe_exit, row.times)),
            wording.percent(row.full.share),
            wording.percent(row.exit.share),
            f"{row.lost:,}",
            f"{row.gained:,}",
            wording.percent(row.settled),
        ]
        for row in (early.rows if early else ())
    ]
    return Table(
        anchor="savings",
        title="What adaptive exit saves",
        caption=f"Residual exit at the model's tolerance{f', {early.tol:.4g},' if early else ''} against running every "
        f"trajectory to the full depth, {report.settings.depth}: lost and gained are puzzles that only the full depth, "
        "or only the exit, answers right.",
        columns=[
            "breadth",
            "NFE, full",
            "NFE, exit",
            "times fewer",
            "accuracy, full",
            "accuracy, exit",
            "lost",
            "gained",
            "met it",
        ],
        words=0,
        rows=[Row(cells) for cells in rows],
        absent="The model's card has no tolerance; `eqr calibrate` finds one.",
    )
