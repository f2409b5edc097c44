"""Numbers, policies and points as people read them. None, what was not measured, becomes the empty string."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport
    from eqr_kernels.studies.replay import Policy

LABELS = {
    "fixed": "fixed depth",
    "residual": "residual exit",
    "q": "q-halt",
    "residual+q": "residual and q",
    "race": "race",
    "race+q": "race, residual and q",
}
"""What each policy is called in pictures and tables."""


def significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits, thousands apart: 0.0123, 12.3, 12,346; 1.2e-07 below a millionth."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(share: float, digits: int = 1) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def interval(ends: tuple[float, float]) -> str:
    """For example "78.8 to 88.9 %"."""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def mebibytes(size: float | None) -> str:
    return "" if size is None else significant(size / 2**20)


def tolerance(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def sizes(policy: Policy) -> str:
    """For example "residual exit, 64 × 8": depth × breadth."""
    return f"{LABELS[policy.name]}, {policy.depth} × {policy.breadth}"


def call(report: CurveReport, policy: Policy, arguments: str | None = None) -> str:
    """What to type in Python for a policy, with these arguments if they are known."""
    settings = report.settings
    seed, seeded = ("", {}) if not settings.seed else (f", seed={settings.seed}", {"seed": settings.seed})
    arguments = arguments or policy.call(views=settings.views, **seeded)
    turned = ""
    if settings.turns is not None:
        views = f"lambda x, n: task.views(x, n{seed})" if seed else "task.views"
        turned = f"turns=ek.Turns({settings.turns.every}, {views}, {settings.turns.cycle}), "
    if settings.views:
        return f"ek.solve_views(model, task.views(inputs, {policy.breadth}{seed}), {turned}{arguments})"
    return f"model.solve(tokens, {turned}{arguments})"


def symmetries(report: CurveReport) -> str:
    """For example " by views, a turn after every 4 outer steps"; "" where there are none."""
    settings = report.settings
    turns = ""
    if settings.turns is not None:
        every = settings.turns.every
        turns = f", a turn after every {f'{every} outer steps' if every > 1 else 'outer step'}"
    return f"{' by views' if settings.views else ''}{turns}"


def setting(policy: Policy) -> str:
    """For example "residual exit, depth 64, breadth 8, tol 0.028"."""
    tol = "" if policy.tol is None else f", tol {policy.tol:.4g}"
    return f"{LABELS[policy.name]}, depth {policy.depth}, breadth {policy.breadth}{tol}"


def currency(report: CurveReport) -> str | None:
    """None without a price."""
    return report.settings.price.currency if report.settings.price else None


def unit_seconds(report: CurveReport) -> str:
    """The unit of a query's cost: "core-seconds" or "GPU-seconds"."""
    return f"{report.unit_costs.unit}-seconds"


def marks(report: CurveReport) -> dict[int, list[str]]:
    """What each point that the report singles out is called, for example {12: ["best"], 7: ["knee", "recommended"]}."""
    bend, recommended = report.bend, report.recommendation
    named = {
        "knee": bend.knee,
        f"within {bend.within_points:g} points": bend.cheapest_within,
        "best": bend.best,
        "recommended": recommended.index if recommended else None,
    }
    marks: dict[int, list[str]] = {}
    for name, index in named.items():
        if index is not None:
            marks.setdefault(index, []).append(name)
    return marks


def recorded(report: CurveReport) -> str:
    """That halting was not looked at after each step, and what follows; "" where it was."""
    depths = report.settings.recorded_depths
    if depths is None:
        return ""
    return (
        f"The {report.backend} backend records {len(depths)} depths of a run, so halting is looked at after so many of "
        f"the {report.settings.depth} steps: a trajectory that halts in between goes on to the next of these, and "
        "costs are a little above what solve spends."
    )
