"""The tables of a curve report, cell by cell as text; what was not measured is an empty cell, never an estimate."""

from __future__ import annotations

from dataclasses import dataclass, field

from eqr_kernels.cli.render import wording as say
from eqr_kernels.cli.render.reading import (
    Point,
    Report,
    as_index,
    count,
    front,
    look,
    marks,
    memory_of,
    number,
    points,
    rows,
    seconds_unit,
)


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


def tables(report: Report) -> list[Table]:
    """All tables, in the order in which they are shown."""
    return [
        _front(report),
        _checked(report),
        _latency(report),
        _memory(report),
        _rates(report),
        _savings(report),
    ]


def _front(report: Report) -> Table:
    everything, named = points(report), marks(report)
    shown = sorted({*front(report), *named}, key=lambda i: (everything[i].seconds or 0.0, everything[i].share or 0.0))
    currency = look(report, "settings", "price", "currency")
    return Table(
        anchor="front",
        title="The Pareto front",
        caption="By rising cost. Every row is more accurate than all cheaper ones; points that the report singles out "
        "are in bold, and are listed even where they are not on the front.",
        columns=[
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
            seconds_unit(report),
            f"{currency or 'money'} per 1000",
            "joules",
            "memory, MiB",
        ],
        words=2,
        rows=[Row(_point(report, everything[i], named.get(i, [])), i in named) for i in shown],
        absent="No point is on it: no accuracy or no cost was measured.",
    )


def _point(report: Report, p: Point, names: list[str]) -> list[str]:
    return [
        ", ".join(names),
        p.label,
        say.whole(p.depth),
        say.whole(p.breadth),
        say.tolerance(p.tol),
        say.percent(p.share),
        say.interval(p.low, p.high),
        say.significant(p.nfe),
        say.significant(p.layers),
        *(say.significant(value) for value in (p.p50, p.p95, p.p99, p.throughput, p.seconds, p.money, p.joules)),
        say.mebibytes(memory_of(report, p.depth, p.breadth)),
    ]


def _checked(report: Report) -> Table:
    everything, found = points(report), []
    for row in rows(report, "checked"):
        index = as_index(report, look(row, "index"), "checked")
        if index is None:
            continue
        p = everything[index]
        found.append(
            [
                p.name,
                ", ".join(str(why) for why in rows(row, "why") if why is not None),
                say.whole(count(look(row, "puzzles"))),
                say.whole(count(look(row, "queries"))),
                say.whole(count(look(row, "correct_computed"))),
                say.whole(count(look(row, "correct"))),
                say.significant(number(look(row, "nfe_computed"))),
                say.significant(number(look(row, "nfe"))),
                say.significant(number(look(row, "latency_ms_computed", "p50"))),
                *(say.significant(number(look(row, "latency_ms", part))) for part in ("p50", "p95", "p99")),
                say.signed_percent(number(look(row, "latency_error"))),
                say.significant(p.throughput),
                say.significant(number(look(row, "throughput"))),
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
        rows=[Row(cells) for cells in found],
        absent="No point was run for real in this report.",
    )


def _latency(report: Report) -> Table:
    fields = ("overhead_ms", "ms_per_nfe")
    return Table(
        anchor="latency",
        title="Time of one query",
        caption="At each breadth: what a query takes before its first outer step, and for each outer step of one "
        "trajectory (NFE).",
        columns=["breadth", "overhead, ms", "ms per NFE"],
        words=0,
        rows=[
            Row([say.whole(count(look(row, "breadth"))), *(say.significant(number(look(row, f))) for f in fields)])
            for row in rows(report, "unit_costs", "latency")
        ],
        absent="It was not measured in this report.",
    )


def _memory(report: Report) -> Table:
    measured = rows(report, "unit_costs", "memory")
    sizes = [(count(look(row, "depth")), count(look(row, "breadth"))) for row in measured]
    depths = sorted({d for d, _ in sizes if d is not None})
    breadths = sorted({b for _, b in sizes if b is not None})
    return Table(
        anchor="memory",
        title="Memory of a solve, MiB",
        caption="The peak above what the process held before.",
        columns=["depth", *(f"breadth {b}" for b in breadths)],
        words=0,
        rows=[Row([str(d), *(say.mebibytes(memory_of(report, d, b)) for b in breadths)]) for d in depths],
        absent="It was not measured in this report.",
    )


def _rates(report: Report) -> Table:
    saturation, energy = look(report, "unit_costs", "saturation"), look(report, "unit_costs", "energy")
    source = look(energy, "source")
    known = [
        ("trajectories in a call, for saturation", say.whole(count(look(saturation, "trajectories")))),
        ("ms per NFE at saturation", say.significant(number(look(saturation, "ms_per_nfe")))),
        (
            f"joules per NFE{'' if source is None else f' ({source})'}",
            say.significant(number(look(energy, "joules_per_nfe"))),
        ),
        ("watts", say.significant(number(look(energy, "watts")))),
        ("layers an outer step", say.whole(count(look(report, "layers_per_step")))),
    ]
    return Table(
        anchor="rates",
        title="Other unit costs",
        caption="Throughput, the cost of a query and its energy are computed from these.",
        columns=["what", "value"],
        words=1,
        rows=[Row(list(pair)) for pair in known],
    )


def _savings(report: Report) -> Table:
    found = []
    for row in rows(report, "savings", "rows"):
        changed = [say.whole(count(look(row, part))) for part in ("lost", "gained")]
        found.append(
            [
                say.whole(count(look(row, "breadth"))),
                *(say.significant(number(look(row, part))) for part in ("nfe_full", "nfe_exit", "times")),
                *(say.percent(number(look(row, part))) for part in ("accuracy_full", "accuracy_exit")),
                *changed,
                say.percent(number(look(row, "settled"))),
            ]
        )
    tol, depth = number(look(report, "savings", "tol")), count(look(report, "savings", "depth"))
    return Table(
        anchor="savings",
        title="What adaptive exit saves",
        caption=f"Residual exit at the model's tolerance{'' if tol is None else f', {tol:.4g},'} against running every "
        f"trajectory to the full depth{'' if depth is None else f', {depth}'}: lost and gained are puzzles that only "
        "the full depth, or only the exit, answers right.",
        columns=[
            "breadth",
            "NFE, full",
            "NFE, exit",
            "times fewer",
            "accuracy, full",
            "accuracy, exit",
            "lost",
            "gained",
            "settled",
        ],
        words=0,
        rows=[Row(cells) for cells in found],
        absent="The model's card has no tolerance; `eqr calibrate` finds one.",
    )
