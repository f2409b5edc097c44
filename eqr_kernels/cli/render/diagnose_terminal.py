"""The tables of `eqr diagnose`, for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.render.wording import percent

if TYPE_CHECKING:
    import numpy.typing as npt

    from eqr_kernels.studies.scaling import Scaling
    from eqr_kernels.studies.statistics import Paired, Quartiles


def draw_diagnosis(report: dict[str, Any], scaling: Scaling, source: npt.ArrayLike) -> None:
    """All tables, and the findings last."""
    settings = report["settings"]
    who = (
        f"{report['puzzles']} of {report['subset']['of']} puzzles" if report["subset"] else f"{scaling.puzzles} puzzles"
    )
    drawing.facts(
        f"{who}, {scaling.restarts} restarts to depth {scaling.depths[-1]}",
        _facts(scaling, f"{settings['tol']:.3g} ({settings['tol_from']})"),
    )
    _residuals(scaling)
    _kinds(scaling)
    _accuracies(scaling)
    if scaling.restarts > 1:
        counts = scaling.modes.counts(source)
        title = f"modes of {scaling.restarts} restarts at depth {scaling.depths[-1]}"
        drawing.modes(title, {**scaling.modes.counts(), **(counts if len(counts) > 1 else {})}, scaling.modes.broad)
    _findings(report["findings"])


def _facts(scaling: Scaling, tol: str) -> dict[str, str]:
    c, a, n = scaling.convergence, scaling.agreement, scaling.convergence.trajectories
    settled = scaling.kinds["settled"]
    right_when_settled = percent(settled["right"] / c.settled if c.settled else math.nan)
    rate = f"{_spread(c.rate)} a step, over {c.rate.count} trajectories"
    facts = {
        "tolerance": tol,
        "settled": f"{percent(c.settled / n)} of {n} trajectories, {right_when_settled} of them on the right answer; "
        f"{percent(c.left / n)} met the tolerance and left it",
        "steps to settle": "-" if math.isnan(c.steps[0]) else f"{c.steps[0]:.0f} half, {c.steps[1]:.0f} 95 %",
        "contraction rate": rate if c.rate.count else "- (no trajectory shows it)",
        "residual at rest": f"{_spread(c.floor)}; of the noise alone about {c.expected_floor:.3g}",
    }
    if scaling.by_depth is not None:
        facts[f"depth {max(1, scaling.depths[-1] // 2)} to {scaling.depths[-1]}"] = _gain(scaling.by_depth)
    if scaling.restarts > 1:
        facts[f"breadth 1 to {scaling.restarts}, residual"] = _gain(scaling.by_breadth)
        for rule, by in scaling.by_rule.items():
            facts[f"residual to {'oracle' if rule == 'any' else rule}"] = _gain(by)
        facts["pairs that agree"] = (
            f"{percent(a.share)} of {a.pairs}; of settled ones {percent(a.settled_share)} of {a.settled_pairs}"
        )
        facts["settled answers"] = ", ".join(f"{n}: {count} puzzles" for n, count in scaling.distinct_answers().items())
        facts["most common answer"] = f"right {a.common_right}, wrong {a.common_wrong}, tied {a.common_tied}"
    auroc = scaling.coupling.residual_auroc
    facts["AUROC of the residual"] = "- (all or none are right)" if math.isnan(auroc) else f"{auroc:.3f}"
    return facts


def _gain(by: Paired) -> str:
    return f"gained {by.gained}, lost {by.lost} of {by.puzzles} puzzles, p = {by.p:.2g}"


def _spread(q: Quartiles) -> str:
    return f"{q.median:.3g} ({q.low:.3g}-{q.high:.3g})" if q.count else "-"


def _residuals(scaling: Scaling) -> None:
    caption = "median and quartiles over the trajectories that are right, or wrong, at the full depth"
    table = Table(title="residual by depth", title_justify="left", caption=caption)
    table.add_column("")
    for depth in scaling.depths:
        table.add_column(f"depth {depth}", justify="right")
    for group in ("right", "wrong"):
        rows = [row.residual for row in scaling.trends if row.group == group]
        table.add_row(group, *(f"{q.median:.3g}\n{q.low:.2g}-{q.high:.2g}" if q.count else "-" for q in rows))
    _print(table)


def _kinds(scaling: Scaling) -> None:
    total = scaling.convergence.trajectories
    table = Table(title=f"trajectories at depth {scaling.depths[-1]}", title_justify="left")
    for name in ("", "right", "wrong", "share"):
        table.add_column(name, justify="right" if name else "left")
    for kind, counts in scaling.kinds.items():
        if some := sum(counts.values()):
            table.add_row(kind, str(counts["right"]), str(counts["wrong"]), percent(some / total))
    _print(table)
    if scaling.periods:
        drawing.lines("periods: " + ", ".join(f"{p} steps: {count}" for p, count in scaling.periods.items()))


def _accuracies(scaling: Scaling) -> None:
    rows = {"1": [scaling.accuracy("residual", k, 0) for k in range(len(scaling.depths))]}
    for rule in scaling.correct if scaling.restarts > 1 else ():
        name = f"{scaling.restarts}, {'oracle' if rule == 'any' else rule}"
        rows[name] = [scaling.accuracy(rule, k, -1) for k in range(len(scaling.depths))]
    drawing.accuracy("accuracy by breadth and by how the answer is selected", scaling.depths, rows)


def _findings(findings: Sequence[dict[str, str]]) -> None:
    table = Table(title="findings", title_justify="left", show_header=False, show_lines=True)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding["name"]), Text(f"{finding['evidence']}.\n{finding['advice']}"))
    _print(table)


def _print(table: Table) -> None:
    Console(highlight=False, emoji=False).print(table)
