"""The report as Markdown: what each row is and cost, then its accuracy at each level of clues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """All tables; `report` is the content of ablation.json."""
    rows = report["rows"]
    parts = [_training(rows)]
    for number, level in enumerate(rows[0]["evaluation"]["levels"] if rows else []):
        total = level["exact"]["1"]["1"]["total"]
        clues = f"{level['clues']} clues" if level["clues"] else "as published"
        parts.append(f"{total} puzzles, {clues}; answered exactly, by depth:\n\n{_level(rows, number)}")
    if report.get("left_out"):
        parts.append(f"Left out, as trained or measured with other settings: {', '.join(report['left_out'])}.")
    if report.get("dry_run"):
        parts.insert(0, "DRY RUN, NOT MEASUREMENTS")
    return "\n\n".join(parts)


def _training(rows: list[Report]) -> str:
    titles = [
        "",
        "parameters",
        "blocks",
        "layers a step",
        "with gradient",
        "steps",
        "puzzles",
        "TFLOP",
        "minutes",
        "last loss",
    ]
    lines = []
    for row in rows:
        t = row["training"]
        lines.append(
            [
                t["title"],
                f"{t['parameters'] / 1e6:.2f} M",
                str(t["blocks"]),
                str(t["applications"]),
                str(t["applications"] - t["without_gradient"]),
                f"{t['steps']:,}",
                f"{t['puzzles_drawn']:,}",
                f"{t['operations'] / 1e12:.3g}",
                f"{t['seconds'] / 60:.1f}",
                f"{t['loss']:.3f}",
            ]
        )
    return _grid(titles, lines)


def _level(rows: list[Report], number: int) -> str:
    levels = [row["evaluation"]["levels"][number] for row in rows]
    depths = sorted({int(depth) for level in levels for depth in level["exact"]["1"]})
    widest = max(int(breadth) for level in levels for breadth in level["exact"])
    wide = [(str(depths[-1]), str(widest))] if widest > 1 else []
    lines = []
    for row, level in zip(rows, levels, strict=True):
        one = level["exact"]["1"]
        deepest = max(map(int, one))
        cells = [_share(one.get(str(d)), interval=d == deepest) for d in depths]
        cells += [_share(level["exact"].get(breadth, {}).get(depth), interval=True) for depth, breadth in wide]
        lines.append([row["training"]["title"], *cells, _number(level.get("residual")), _number(level.get("auroc"))])
    return _grid(["", *map(str, depths), *(" x ".join(pair) for pair in wide), "last residual", "AUROC"], lines)


def _share(cell: Report | None, interval: bool) -> str:
    if cell is None:
        return "-"
    low, high = (100 * end for end in cell["wilson95"])
    return f"{100 * cell['share']:.1f} %" + (f" ({low:.1f}-{high:.1f})" if interval else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
