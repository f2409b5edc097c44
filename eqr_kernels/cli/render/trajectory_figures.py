"""Pictures of what becomes of trajectories: residual and correctness, steps to convergence."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eqr_kernels.cli.render import style
from eqr_kernels.cli.render.wording import percent, tolerance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eqr_kernels.studies.curve_report import CurveReport

_BARS_AT_MOST = 128  # a step each up to here, several to a bar beyond


@style.picture
def residual_and_correctness(report: CurveReport) -> Figure:
    """How many right and wrong trajectories have each residual, with the tolerance.

    Raises:
        NoData: all trajectories diverged.
    """
    seen, tol = report.residuals, report.settings.card_tol
    edges, right, wrong = seen.log10_edges, seen.right_counts, seen.wrong_counts
    if not sum(right) + sum(wrong):
        raise style.NoData("all trajectories diverged")
    parts = [
        f"depth {report.settings.depth}",
        "none or all are right, so there is no AUROC" if seen.auroc is None else f"AUROC {seen.auroc:.3f}",
        "" if tol is None else f"dashed: tolerance {tolerance(tol)}",
    ]
    figure = style.new_figure(report, 4.4, "Residual of right and wrong trajectories", *filter(None, parts))
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, counts, colour, name in ((upper, right, style.BLUE, "right"), (lower, wrong, style.VERMILLION, "wrong")):
        axes.stairs(counts, edges, fill=True, color=colour)
        axes.set_ylim(0, 1.15 * max(counts) or 1)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        style.plain_ticks(axes.yaxis)
        axes.set_ylabel(f"{name}\ntrajectories")
        if tol is not None:
            axes.axvline(math.log10(tol), color=style.INK, linestyle="--", linewidth=1.2)
        axes.text(
            0.995,
            0.93,
            f"{sum(counts):,.0f} {name}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=colour,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )
    low, high = min(edges), max(edges)
    if tol is not None:
        low, high = min(low, math.log10(tol)), max(high, math.log10(tol))
    lower.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    _decades(lower, low, high)
    lower.set_xlabel("residual at the last step (logarithmic)")
    return figure


def _decades(axes: Axes, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 times powers of ten on an axis of logarithms."""
    values = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    if high - low > 3:
        values = [10.0**k for k in range(math.floor(low), math.ceil(high) + 1, math.ceil((high - low) / 12))]
    inside = [value for value in values if low <= math.log10(value) <= high]
    axes.set_xticks([math.log10(value) for value in inside], [f"{value:g}" for value in inside])


@style.picture
def steps_to_convergence(report: CurveReport) -> Figure:
    """Share of each group's puzzles that meet the tolerance at each outer step, with the right and with a wrong answer,
    and of those that never do.

    Raises:
        NoData: the model has no tolerance.
    """
    if report.settling is None:
        raise style.NoData("the model's card has no tolerance that a puzzle could meet")
    groups, depth = report.settling.groups, report.settings.depth
    width = math.ceil(depth / _BARS_AT_MOST)
    parts = [f"tolerance {tolerance(report.settling.tol)}", "blue: with the right answer, red: with a wrong one"]
    figure = style.new_figure(report, 1.7 + 1.05 * len(groups), "Outer steps to convergence by difficulty", *parts)
    grid = figure.subplots(len(groups), 2, sharex="col", sharey="col", squeeze=False, width_ratios=[9, 1])
    edges = [min(k, depth) + 0.5 for k in range(0, depth + width, width)]
    top = 0.0
    for group, (axes, never) in zip(groups, grid, strict=True):
        right, both = (
            [100 * sum(steps[k : k + width]) / group.puzzles for k in range(0, depth, width)]
            for steps in (group.right, group.steps)
        )
        top = max(top, *both)
        axes.stairs(right, edges, fill=True, color=style.BLUE, label="right")
        axes.stairs(both, edges, baseline=right, fill=True, color=style.VERMILLION, label="wrong")
        settled, median = group.settled / group.puzzles, _median_step(group.steps)
        known = f", {percent(sum(group.right) / group.settled)} of these right" if group.settled else ""
        half = known + ("" if median is None else f", half by step {median}")
        name = textwrap.shorten(group.name.replace("_", " "), 40, placeholder="…")
        axes.text(
            0.995,
            0.93,
            f"{name}: {percent(settled)} of {group.puzzles:,} meet it{half}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )
        never.bar([0], [100 * (1 - settled)], width=0.7, color=style.FAINT, hatch="///", edgecolor="white")
        never.text(0, 100 * (1 - settled) + 4, percent(1 - settled, 0), ha="center", va="bottom", fontsize=9)
    for axes, never in grid:
        axes.set_ylim(0, 1.45 * top or 1)
        axes.yaxis.get_major_locator().set_params(nbins=3)
        axes.set_xlim(0.5, depth + 0.5)
        never.spines["left"].set_visible(False)
        never.spines["right"].set_visible(True)
        never.set_ylim(0, 130)  # room for the number
        never.set_yticks([0, 50, 100])
        never.yaxis.tick_right()
        never.grid(False)
        never.set_xlim(-0.6, 0.6)
        never.set_xticks([0], ["never"])
    bar = "a step" if width == 1 else f"per {width} steps"
    grid[-1][0].set_xlabel("outer step at which the tolerance is met")
    figure.supylabel(f"share of puzzles {bar} (%)", fontsize=10)
    return figure


def _median_step(steps: Sequence[int]) -> int | None:
    """The step by which half of those that settle have."""
    total, seen = sum(steps), 0
    for k, settled in enumerate(steps, 1):
        seen += settled
        if total and 2 * seen >= total:
            return k
    return None
