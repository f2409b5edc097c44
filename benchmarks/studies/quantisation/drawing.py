"""The tables of a quantisation study."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def draw(study: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `benchmarks.studies.quantisation.study.study` returned."""
    console = console or Console(highlight=False)
    for table in tables(study):
        console.print(table)
    for missing in study["not_available"]:
        console.print(f"not available: {missing['name']}: {missing['why']}", markup=False)
    console.print(f"recommendation: {study['recommendation']}", markup=False)


def tables(study: dict[str, Any]) -> list[Table]:
    """Accuracy; cost and verdict; basins; displacement; straying; residual and tolerance."""
    rows = [study["baseline"], *study["control"], *study["variants"]]
    return [
        _accuracy(study, rows),
        _cost(rows),
        _basins(study, rows[1:]),
        _displacement(study, rows[1:]),
        *_straying(rows),
        _residuals(study, rows),
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption="* simulated: rounded weights in a wider kernel")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _name(row: dict[str, Any]) -> str:
    return row["name"].removesuffix(" (simulated)") + " *" * (row["simulated"] and not row["control"])


def _accuracy(study: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    size = f"{study['puzzles']} puzzles, depth {study['depth']}, breadth {study['breadth']}"
    table = _table(f"accuracy: {size}", "right", "[95 %]", "gained", "lost", "points", "[95 %]", "p")
    for row in rows:
        gains, paired = [], row.get("paired")
        if paired:
            counts = [str(paired[name]) for name in ("gained", "lost")]
            points = [f"{100 * paired['difference']:+.1f}", _interval(paired["tango95"], "+.1f")]
            gains = [*counts, *points, f"{paired['mcnemar_p']:.2g}"]
        right = row["accuracy"]
        table.add_row(_name(row), f"{100 * right['share']:.1f} %", _interval(right["wilson95"]), *gains)
    return table


def _cost(rows: list[dict[str, Any]]) -> Table:
    table = _table("cost", "weights, bytes", "of fp32", "ms a step", "as fast as bf16", "verdict")
    for row in rows:
        size = row["weight_bytes"]
        table.add_row(
            _name(row),
            f"{size:,}",
            f"{size / rows[0]['weight_bytes']:.2f}",
            _number(row["ms_per_step"], ".3g"),
            _number(row["times_as_fast"], ".2f", "x"),
            row.get("verdict", ""),
        )
    return table


def _basins(study: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    table = _table(
        f"basins: {study['puzzles'] * study['breadth']} trajectories (puzzles in brackets)",
        "changed",
        "[95 %]",
        "settled elsewhere",
        "no longer settled",
        "newly settled",
        "right to wrong",
        "wrong to right",
        "right kept, less another seed's",
        "trajectories right",
    )
    names = (
        "settled_elsewhere",
        "settled_in_baseline_only",
        "settled_here_only",
        "right_to_wrong",
        "wrong_to_right",
    )
    for row in rows:
        changed = row["changed_basin"]
        counts = [f"{row[name]['count']} ({row[name]['puzzles']})" for name in names]
        more = [_difference(row["right_kept"]), _difference(row["trajectories"])]
        table.add_row(_name(row), f"{100 * changed['share']:.1f} %", _interval(changed["wilson95"]), *counts, *more)
    return table


def _displacement(study: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "displacement without noise: from the same starts, and from fp32's fixed points",
        "median",
        "90 %",
        "max",
        "same basin",
        "last residual",
        "from points: median",
        "max",
        "still there",
    )
    spread = study["baseline"]["spread"]
    moves = [(_name(row), row["displacement"]) for row in rows]
    if spread:
        moves += [(f"fp32, {name.replace('_', ' ')}", spread[name]) for name in ("two_noise_draws", "two_restarts")]
    for name, moved in moves:
        if moved:
            same = f"{moved['same_basin']} of {moved['trajectories']}"
            ends = [_number(moved[end], ".2g") for end in ("median", "p90", "max")]
            more, stayed = [], moved.get("from_fixed_point")
            if stayed:
                kept = f"{stayed['same_basin']} of {stayed['lost']['total']}"
                more = [*(_number(stayed[end], ".2g") for end in ("median", "max")), kept]
            table.add_row(name, *ends, same, _number(moved.get("noise_free_residual"), ".1e"), *more)
    return table


def _straying(rows: list[dict[str, Any]]) -> list[Table]:
    """One table, or none where nothing was measured."""
    known = _strays(rows)
    if not known:
        return []
    title = f"straying from fp32, {known[0][1]['trajectories']} puzzles: distance (other tokens)"
    table = _table(title, *(f"step {k}" for k in known[0][1]["steps"]))
    for name, strayed in known:
        table.add_row(name, *_strayed(strayed))
    return [table]


def _strays(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Name and straying of what has one; the baseline's is its own under the noise of another seed."""
    names = ["fp32, another seed's noise", *map(_name, rows[1:])]
    return [(name, row["straying"]) for name, row in zip(names, rows, strict=True) if row.get("straying")]


def _strayed(strayed: dict[str, Any]) -> list[str]:
    pairs = zip(strayed["median"], strayed["other_tokens"], strict=True)
    return [f"{_number(away, '.1e')} ({100 * other:.1f} %)" for away, other in pairs]


def _residuals(study: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "residual, and halting at the tolerance",
        "tol",
        "floor",
        "AUROC",
        "settled",
        "and right",
        "fires",
        "right then",
        "steps",
    )
    for row in rows:
        halting, settled = row["tolerance"], row["settled_right"]
        table.add_row(
            _name(row),
            f"{halting['tol']:g}",
            _number(row["residual_floor"], ".4f"),
            _number(row["auroc"], ".3f"),
            f"{100 * row['settled_share']:.1f} %",
            f"{settled['count']} of {settled['total']}",
            f"{100 * halting['fired']['share']:.1f} %",
            f"{halting['right_when_fired']['count']} of {halting['right_when_fired']['total']}",
            _number(halting["mean_steps"], ".1f"),
        )
    return table


def markdown(study: dict[str, Any]) -> str:
    """The tables of docs/quantisation.md (accuracy with cost, attractors, straying), and the recommendation."""
    rows = [study["baseline"], *study["control"], *study["variants"]]
    first = [
        [
            "",
            "right",
            "gained, lost",
            "points [95 %]",
            "right kept, less another seed's",
            "bytes",
            "as fast as bf16",
            "verdict",
        ]
    ]
    second = [
        ["", "floor", "settled", "and right", "changed basin", "settled elsewhere", "moved", "attractors still there"]
    ]
    for row in rows:
        paired, moved, settled = row.get("paired"), row.get("displacement"), row["settled_right"]
        first.append(
            [
                _name(row),
                f"{100 * row['accuracy']['share']:.1f} %",
                f"{paired['gained']}, {paired['lost']}" if paired else "",
                f"{100 * paired['difference']:+.1f} {_interval(paired['tango95'], '+.1f')}" if paired else "",
                _difference(row.get("right_kept")),
                f"{row['weight_bytes'] / rows[0]['weight_bytes']:.2f}",
                _number(row["times_as_fast"], ".2f", "x"),
                row.get("verdict", ""),
            ]
        )
        changed = "changed_basin" in row and f"{100 * row['changed_basin']['share']:.1f} %"
        stayed = moved["from_fixed_point"] if moved else None
        second.append(
            [
                _name(row),
                _number(row["residual_floor"], ".4f"),
                f"{100 * row['settled_share']:.1f} %",
                f"{settled['count']} of {settled['total']}",
                changed or "",
                str(row["settled_elsewhere"]["count"]) if changed else "",
                _number(moved["median"], ".1e") if moved else "",
                f"{stayed['same_basin']} of {stayed['lost']['total']}" if stayed else "",
            ]
        )
    spread = study["baseline"]["spread"]
    for name in ("two_noise_draws", "two_restarts"):
        if spread and spread[name]:
            moved = _number(spread[name]["median"], ".1e")
            second.append([f"fp32, {name.replace('_', ' ')}", *[""] * 5, moved, ""])
    written = [first, second]
    strays = _strays(rows)
    if strays:
        third = [["", *(f"step {k}" for k in strays[0][1]["steps"])]]
        written.append([*third, *([name, *_strayed(strayed)] for name, strayed in strays)])
    return "\n\n".join([*map(_markdown_table, written), study["recommendation"]])


def _markdown_table(rows: list[list[str]]) -> str:
    # A lone asterisk would begin emphasis.
    lines = ["| " + " | ".join(row).replace(" *", r" \*") + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _difference(clustered: dict[str, Any] | None) -> str:
    if clustered is None:
        return ""
    return f"{100 * clustered['difference']:+.1f} {_interval(clustered['interval95'], '+.1f')}"


def _interval(ends: list[float], form: str = ".1f") -> str:
    return "[" + ", ".join(f"{100 * end:{form}}" for end in ends) + "]"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
