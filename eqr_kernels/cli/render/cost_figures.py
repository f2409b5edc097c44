"""Pictures of what a query costs: accuracy against cost, latency against breadth, memory against depth."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Any

from eqr_kernels.cli.render import style, wording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eqr_kernels.studies.curve_report import CheckedPoint, CurveReport
    from eqr_kernels.studies.points import Point

_RASTER_ABOVE = 2000  # points: an SVG of more would be megabytes
_LABEL_WIDTH = 0.25  # of the axes: four labels fit
_LATENCY_DEPTHS = 5


@style.picture
def accuracy_against_cost(report: CurveReport) -> Figure:
    """Every point by its cost and accuracy, the Pareto front with its 95 % intervals, and the points singled out."""
    points = report.points
    figure = style.new_figure(report, 5.6, "Accuracy against the cost of a query", f"{len(points)} points")
    axes = figure.subplots()
    for policy in wording.LABELS:
        ours = [p for p in points if p.policy.name == policy]
        colour, marker = style.POLICY_LOOKS[policy]
        if ours:
            axes.scatter(
                [p.unit_seconds for p in ours],
                [100 * p.accuracy.share for p in ours],
                s=22,
                c=colour,
                marker=marker,
                alpha=0.35,
                linewidths=0,
                label=wording.LABELS[policy],
                rasterized=len(points) > _RASTER_ABOVE,
            )
    front, named = [points[i] for i in report.bend.front], wording.marks(report)
    _draw_front(axes, front)
    shares = [100 * p.accuracy.share for p in points]
    low = min(*shares, *(100 * p.accuracy.interval[0] for p in front))
    high = max(*shares, *(100 * p.accuracy.interval[1] for p in front))
    room = max(high - low, 1.0)
    costs = [p.unit_seconds for p in points]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    axes.set_ylim(low - 0.04 * room, high + room * 0.36)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - 0.04 * room <= tick <= min(high + 0.05 * room, 100)])
    style.plain_ticks(axes.xaxis, log=True)
    axes.set_xlabel(f"{wording.unit_seconds(report)} a query, at saturation")
    axes.set_ylabel("puzzles answered exactly (%)")
    _add_price(axes, report)
    _label_marks(axes, [(names, points[i]) for i, names in named.items()])
    for handle in figure.legend(loc="outside lower center", ncols=4, columnspacing=1.2).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    return figure


def _draw_front(axes: Axes, front: list[Point]) -> None:
    xs, ys = [p.unit_seconds for p in front], [100 * p.accuracy.share for p in front]
    axes.step(xs, ys, where="post", color=style.INK, linewidth=1.4, label="Pareto front, 95 % intervals", zorder=3)
    for p, x, y in zip(front, xs, ys, strict=True):
        (low, high), (colour, marker) = p.accuracy.interval, style.POLICY_LOOKS[p.policy.name]
        bar = [[y - 100 * low], [100 * high - y]]
        axes.errorbar(x, y, bar, ecolor=style.INK, elinewidth=0.9, capsize=2.5, alpha=0.6, zorder=3)
        axes.plot(x, y, marker, color=colour, markersize=6, markeredgecolor=style.INK, markeredgewidth=0.8, zorder=4)


def _add_price(axes: Axes, report: CurveReport) -> None:
    """Money on a second axis; both are proportional, so one axis serves for all points."""
    rates = [p.cost_per_1000 / p.unit_seconds for p in report.points if p.cost_per_1000 is not None]
    if not rates:
        return
    rate = sorted(rates)[len(rates) // 2]
    if any(abs(other - rate) > 1e-3 * rate for other in rates):
        raise ValueError(
            "report's points must all cost the same money a second for a second axis, got "
            f"{min(rates):.6g} to {max(rates):.6g} for 1000 puzzles a second; write it again with `eqr curve`"
        )
    there_and_back: Any = (lambda seconds: seconds * rate, lambda cost: cost / rate)
    top = axes.secondary_xaxis("top", functions=there_and_back)
    top.set_xlabel(f"{wording.currency(report)} for 1000 puzzles")
    top.spines["top"].set_visible(True)
    low, high = axes.get_xlim()
    top.set_xlim(low * rate, high * rate)
    style.plain_ticks(top.xaxis, log=True)


def _label_marks(axes: Axes, named: list[tuple[list[str], Point]]) -> None:
    """Labels in a strip above the front, which no point can reach, each with a line to its point."""
    ordered = sorted(named, key=lambda row: row[1].unit_seconds)
    data = [(p.unit_seconds, 100 * p.accuracy.share) for _, p in ordered]
    tops = [(p.unit_seconds, 100 * p.accuracy.interval[1]) for _, p in ordered]
    at = axes.transAxes.inverted().transform(axes.transData.transform(tops))
    places = style.spread([float(across) for across, _ in at], _LABEL_WIDTH)
    for (names, p), (x, y), (across, up), place in zip(ordered, data, at, places, strict=True):
        heading = textwrap.fill(" = ".join(names), 24)
        axes.text(
            place,
            0.845,
            f"{heading}\n{wording.sizes(p.policy)}\n{wording.percent(p.accuracy.share)} at {wording.significant(x)} s",
            ha="center",
            va="bottom",
            transform=axes.transAxes,
            fontsize=8.5,
            linespacing=1.25,
            zorder=6,
        )
        # Straight up from the interval: nothing stands above the front.
        lead = ([across, across, place], [up + 0.012, 0.79, 0.835])
        axes.plot(*lead, color=style.FAINT, linewidth=0.9, linestyle=":", transform=axes.transAxes, zorder=2)
        axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=style.INK, zorder=5)


@style.picture
def latency_against_breadth(report: CurveReport) -> Figure:
    """Latency of one query at some fixed depths, computed from the unit costs, and what was measured at some points."""
    unit, depths = report.unit_costs.latency, report.settings.depths
    figure = style.new_figure(report, 4.6, "Latency of one query against breadth", "one query at a time")
    axes = figure.subplots()
    shown = depths if len(depths) <= _LATENCY_DEPTHS else [depths[k] for k in _evenly(len(depths), _LATENCY_DEPTHS)]
    for colour, marker, depth in zip(style.SERIES, style.SERIES_MARKERS, reversed(shown), strict=False):
        ys = [x.overhead_ms + x.ms_per_nfe * depth * x.breadth for x in unit]
        xs = [x.breadth for x in unit]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=4, label=f"fixed depth {depth}")
    _draw_checked(axes, report)
    axes.set_yscale("log")
    style.powers_of_two(axes, [x.breadth for x in unit])
    style.plain_ticks(axes.yaxis, log=True)
    axes.set_xlabel("breadth (trajectories a puzzle)")
    axes.set_ylabel("milliseconds a query")
    figure.legend(loc="outside right center", title="lines: computed", alignment="left")
    return figure


def _evenly(n: int, kept: int) -> list[int]:
    return [round(k * (n - 1) / (kept - 1)) for k in range(kept)]


def _draw_checked(axes: Axes, report: CurveReport) -> None:
    """Points that were run for real, with their measured median and 95th percentile."""

    def breadth_of(row: CheckedPoint) -> int:
        return report.points[row.index].policy.breadth

    rows = sorted(report.checked, key=lambda row: (breadth_of(row), row.run.latency_ms[0]))
    for breadth, group in groupby(rows, key=breadth_of):
        same = list(group)
        for k, row in enumerate(same):
            x = breadth * 1.09 ** (k - (len(same) - 1) / 2)  # side by side
            p50, p95, _ = row.run.latency_ms
            axes.vlines(x, p50, max(p50, p95), color=style.INK, linewidth=1, zorder=4)
            axes.plot(x, p50, "o", color=style.INK, markersize=6, zorder=5)
            axes.plot(x, row.run.computed_ms[0], "_", color=style.INK, markersize=13, markeredgewidth=1.5, zorder=5)
    if rows:
        axes.plot([], [], "o", color=style.INK, label="measured p50;\nline up to p95")
        axes.plot([], [], "_", color=style.INK, markersize=13, markeredgewidth=1.5, label="computed p50\nof the same")


@style.picture
def memory_against_depth(report: CurveReport) -> Figure:
    """Peak memory of a solve by depth, a line for each breadth.

    Raises:
        NoData: memory was not measured.
    """
    measured = sorted((m.breadth, m.depth, m.peak_bytes) for m in report.unit_costs.memory)
    if not measured:
        raise style.NoData("the memory of a solve was not measured")
    largest = max(size for _, _, size in measured)
    unit, scale = ("GiB", 2**30) if largest >= 2**31 else ("MiB", 2**20)
    figure = style.new_figure(report, 4.0, "Memory against depth", "above what the process held before")
    axes = figure.subplots()
    by_breadth = {b: list(group) for b, group in groupby(measured, key=lambda row: row[0])}
    looks = [(colour, marker) for marker in style.SERIES_MARKERS for colour in style.SERIES]
    if len(by_breadth) <= len(style.SERIES):
        looks = list(zip(style.SERIES, style.SERIES_MARKERS, strict=True))
    # From the greatest, so that the legend stands in the order of the lines.
    for (breadth, rows), (colour, marker) in zip(reversed(by_breadth.items()), looks, strict=False):
        ys = [size / scale for _, _, size in rows]
        axes.plot([d for _, d, _ in rows], ys, color=colour, marker=marker, markersize=5, label=f"breadth {breadth}")
    style.powers_of_two(axes, [d for _, d, _ in measured])
    axes.set_ylim(0, max(1.15 * largest / scale, 1e-3))
    style.plain_ticks(axes.yaxis)
    axes.set_xlabel("depth (outer steps)")
    axes.set_ylabel(f"peak memory of a solve ({unit})")
    figure.legend(loc="outside right center")
    return figure
