"""What has been found so far, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import GOALS, PRESET
from .stages import FUSED, PEERS

Rows = list[dict[str, Any]]


def text(report: dict[str, Any]) -> str:
    """The whole report: stages, outer steps, early exit, memory."""
    stages = report["stages"]
    mark = "DRY RUN, NOT MEASUREMENTS: " if report["dry_run"] else ""
    device = stages.get("environment", {}).get("device") or "no GPU"
    parts = [f"{mark}{device}, commit {report.get('commit') or 'unknown'}, {report['seconds']:.0f} s"]
    lines = [[name, *_outcome(stage)] for name, stage in stages.items()]
    parts.append(_grid(["stage", "s", "outcome"], lines))
    if rate := gemm_rate(report):
        parts.append(f"{mark}bf16 product: {rate / 1e12:.3g} TFLOP/s, median of this run")
    if rows := stages.get("outer_step", {}).get("rows"):
        preset = next((row["preset"] for row in rows if "preset" in row), PRESET)
        parts.append(f"{mark}one outer step, {preset}, bf16, fixed depth (ms, share of the product's rate)")
        parts.append(outer_steps(rows, rate))
        parts.append(_goals(rows, rate))
    if rows := stages.get("early_exit", {}).get("rows"):
        parts.append(f"{mark}early exit on real puzzles, shipped model")
        parts.append(_early(rows))
    if rows := stages.get("memory", {}).get("rows"):
        parts.append(f"{mark}memory by depth")
        parts.append(_memory(rows))
    return "\n\n".join(parts)


def gemm_rate(report: dict[str, Any]) -> float | None:
    rows = report["stages"].get("gemm", {}).get("rows") or [{}]
    rate: float | None = rows[0].get("per_second")
    return rate


def share(row: dict[str, Any], rate: float | None) -> float | None:
    """The rate of an outer step's matrix products over that of the bare product."""
    return None if rate is None or "ms" not in row else row["operations"] / (row["ms"] / 1e3) / rate


def best_peer(rows: Rows, size: int) -> dict[str, Any] | None:
    """The fastest PyTorch at that many trajectories."""
    peers = [r for r in rows if r["contender"] in PEERS and r.get("trajectories") == size and "ms" in r]
    return min(peers, key=lambda r: float(r["ms"]), default=None)


def compared(rows: Rows, rate: float | None) -> None:
    """Adds to each row its share of the product's rate, and to ours how many times as fast as the best peer it is."""
    for row in rows:
        if "ms" not in row:
            continue
        row["share_of_gemm"] = share(row, rate)
        peer = best_peer(rows, row["trajectories"])
        if peer is not None and row["contender"] not in PEERS:
            row |= {"best_peer": peer["contender"], "times_best_peer": peer["ms"] / row["ms"]}


def outer_steps(rows: Rows, rate: float | None) -> str:
    sizes = sorted({row["trajectories"] for row in rows if "trajectories" in row})
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for size in sizes:
            row = next((r for r in rows if r["contender"] == name and r.get("trajectories") == size), {})
            part = share(row, rate)
            cells.append("-" if "ms" not in row else f"{row['ms']:.3g}" + ("" if part is None else f" {part:.1%}"))
        lines.append([name, *cells])
        why = [
            row[key]
            for row in rows
            if row["contender"] == name
            for key in ("skipped", "wrong", "failure")
            if key in row
        ]
        if why:
            lines[-1].append(_short(why[0]))
    return _grid(["", *(f"n={size}" for size in sizes), ""], lines)


def _goals(rows: Rows, rate: float | None) -> str:
    many = f"n >= {GOALS['from']}"
    lines = []
    for name in FUSED:
        mine = [r for r in rows if r["contender"] == name and "ms" in r]
        large = [r for r in mine if r["trajectories"] >= GOALS["from"]]
        shares = [s for r in large if (s := share(r, rate)) is not None]
        ratios = [p["ms"] / r["ms"] for r in large if (p := best_peer(rows, r["trajectories"])) is not None]
        alone = next((r["ms"] for r in mine if r["trajectories"] == 1), None)
        lines.append(
            [
                name,
                _against(min(shares, default=None), GOALS["share_of_gemm"], "{:.1%}", at_least=True),
                _against(min(ratios, default=None), GOALS["times_best_peer"], "{:.2f}x", at_least=True),
                _against(alone, GOALS["ms_one_trajectory"], "{:.3f} ms", at_least=False),
            ]
        )
    return _grid(["goals", f"share of the product, {many}", f"times the best PyTorch, {many}", "n = 1"], lines)


def _against(value: float | None, goal: float, form: str, at_least: bool) -> str:
    goal_text = f"goal {'>=' if at_least else '<='} {form.format(goal)}"
    if value is None:
        return f"not measured ({goal_text})"
    reached = value >= goal if at_least else value <= goal
    return f"{form.format(value)} ({goal_text}: {'reached' if reached else 'missed'})"


def _early(rows: Rows) -> str:
    lines = []
    for row in rows:
        if "early_s" not in row:
            lines.append([row["backend"], _short(row.get("failure", ""))])
            continue
        agree = f"{row['agree']} of {row['both_settled']}"
        times = [f"{row[key] * 1e3:.4g}" for key in ("early_s", "full_s")]
        lines.append([row["backend"], *times, f"{row['times_as_fast']:.2f}x", agree, row.get("wrong", "")])
    return _grid(["", "early exit, ms", "full depth, ms", "faster", "same answer where both settle", ""], lines)


def _memory(rows: Rows) -> str:
    lines = []
    for row in rows:
        if "peak_bytes" not in row:
            lines.append([row["backend"], _short(row.get("failure", ""))])
            continue
        peaks = [f"depth {d}: {b / 2**20:.1f} MiB" for d, b in zip(row["depths"], row["peak_bytes"], strict=True)]
        lines.append([row["backend"], *peaks, row.get("wrong", "")])
    return _grid(["", "", "", ""], lines)


def _outcome(stage: dict[str, Any]) -> list[str]:
    seconds = f"{stage['seconds']:.0f}" if "seconds" in stage else "-"
    for key in ("failed", "skipped"):
        if key in stage:
            return [seconds, f"{key}: {_short(stage[key], 90)}"]
    counts = ", ".join(f"{number} {name}" for name, number in stage.get("outcomes", {}).items())
    return [seconds, "not finished" if "seconds" not in stage else f"ok{': ' + counts if counts else ''}"]


def _short(reason: str, most: int = 60) -> str:
    line = (reason.strip().splitlines() or [""])[0]
    return line if len(line) <= most else line[: most - 3] + "..."


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(titles), *([*line, *[""] * (len(titles) - len(line))] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows)
