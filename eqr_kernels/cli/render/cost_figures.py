"""Pictures of what a query costs: accuracy against cost, latency against breadth, memory against depth."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING, Any

from eqr_kernels.cli.render import style
from eqr_kernels.cli.render.reading import (
    POLICIES,
    Point,
    Report,
    as_index,
    count,
    front,
    look,
    marks,
    number,
    points,
    rows,
    seconds_unit,
)
from eqr_kernels.cli.render.wording import percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RASTER_ABOVE = 2000  # points: an SVG of more would be megabytes
_LABEL_WIDTH = 0.25  # of the axes: four labels fit
_LATENCY_DEPTHS = 5


@style.picture
def accuracy_against_cost(report: Report) -> Figure:
    """Every point by its cost and accuracy, the Pareto front with its 95 % intervals, and the points singled out.

    Raises:
        NoData: no point has both.
    """
    everything = points(report)
    placed = {i: (p, *xy) for i, p in enumerate(everything) if (xy := _place(p)) is not None}
    if not placed:
        raise style.NoData("no point has both an accuracy and a cost in core-seconds or GPU-seconds")
    figure = style.new_figure(report, 5.6, "Accuracy against the cost of a query", f"{len(placed)} points")
    axes = figure.subplots()
    present = {p.policy for p, _, _ in placed.values()}
    for policy in [*(name for name in POLICIES if name in present), *sorted(present - set(POLICIES))]:
        colour, marker = style.POLICY_LOOKS.get(policy, style.OTHER_LOOK)
        xs, ys = zip(*[(x, y) for p, x, y in placed.values() if p.policy == policy], strict=True)
        axes.scatter(
            xs,
            ys,
            s=22,
            c=colour,
            marker=marker,
            alpha=0.35,
            linewidths=0,
            label=POLICIES.get(policy, policy),
            rasterized=len(placed) > _RASTER_ABOVE,
        )
    ours = sorted((placed[i] for i in front(report) if i in placed), key=lambda row: row[1])
    if ours:
        _draw_front(axes, ours)
    lows = [100 * p.low if p.low is not None else y for p, _, y in ours]
    highs = [100 * p.high if p.high is not None else y for p, _, y in ours]
    shares = [y for _, _, y in placed.values()]
    low, high = min(shares + lows), max(shares + highs)
    room = max(high - low, 1.0)
    named = {i: names for i, names in marks(report).items() if i in placed}
    axes.set_xscale("log")
    costs = [x for _, x, _ in placed.values()]
    axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    axes.set_ylim(low - 0.04 * room, high + room * (0.36 if named else 0.05))
    axes.set_yticks([tick for tick in axes.get_yticks() if low - 0.04 * room <= tick <= min(high + 0.05 * room, 100)])
    style.plain_ticks(axes.xaxis, log=True)
    axes.set_xlabel(f"{seconds_unit(report)} a query, at saturation")
    axes.set_ylabel("puzzles answered exactly (%)")
    _add_price(axes, report, everything)
    _label_marks(axes, {i: (names, *placed[i]) for i, names in named.items()})
    for handle in figure.legend(loc="outside lower center", ncols=6).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    return figure


def _place(p: Point) -> tuple[float, float] | None:
    """Cost and accuracy in percent."""
    return None if p.share is None or p.seconds is None or p.seconds <= 0 else (p.seconds, 100 * p.share)


def _draw_front(axes: Axes, ours: list[tuple[Point, float, float]]) -> None:
    xs, ys = [x for _, x, _ in ours], [y for _, _, y in ours]
    axes.step(xs, ys, where="post", color=style.INK, linewidth=1.4, label="Pareto front, 95 % intervals", zorder=3)
    for p, x, y in ours:
        colour, marker = style.POLICY_LOOKS.get(p.policy, style.OTHER_LOOK)
        if p.low is not None and p.high is not None:
            axes.vlines(x, 100 * p.low, 100 * p.high, color=style.INK, linewidth=0.9, alpha=0.6, zorder=3)
        axes.plot(x, y, marker, color=colour, markersize=6, markeredgecolor=style.INK, markeredgewidth=0.8, zorder=4)


def _add_price(axes: Axes, report: Report, everything: list[Point]) -> None:
    """Money on a second axis; both are proportional, so one axis serves for all points."""
    rates = [p.money / p.seconds for p in everything if p.money is not None and p.seconds]
    if not rates or look(report, "settings", "price") is None:
        return
    rate = sorted(rates)[len(rates) // 2]
    if rate <= 0 or any(abs(other - rate) > 1e-3 * rate for other in rates):
        raise ValueError(
            "report's points must all cost the same money a second for a second axis, got "
            f"{min(rates):.6g} to {max(rates):.6g} for 1000 puzzles a second; write it again with `eqr curve`"
        )
    there_and_back: Any = (lambda seconds: seconds * rate, lambda cost: cost / rate)
    top = axes.secondary_xaxis("top", functions=there_and_back)
    currency = look(report, "settings", "price", "currency") or "money"
    top.set_xlabel(f"{currency} for 1000 puzzles")
    top.spines["top"].set_visible(True)
    low, high = axes.get_xlim()
    top.set_xlim(low * rate, high * rate)
    style.plain_ticks(top.xaxis, log=True)


def _label_marks(axes: Axes, named: dict[int, tuple[list[str], Point, float, float]]) -> None:
    """Labels in a strip above the front, which no point can reach, each with a line to its point."""
    ordered = sorted(named.values(), key=lambda row: row[2])
    if not ordered:
        return
    at = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for _, _, x, y in ordered]))
    places = style.spread([float(across) for across, _ in at], _LABEL_WIDTH)
    for (names, p, x, y), (across, up), place in zip(ordered, at, places, strict=True):
        heading = textwrap.fill(" = ".join(names), 24)
        axes.text(
            place,
            0.845,
            f"{heading}\n{p.short}\n{percent(p.share)} at {significant(x)} s",
            ha="center",
            va="bottom",
            transform=axes.transAxes,
            fontsize=8.5,
            linespacing=1.25,
            zorder=6,
        )
        # Straight up from the point: nothing stands above the front.
        lead = ([across, across, place], [up, 0.79, 0.835])
        axes.plot(*lead, color=style.FAINT, linewidth=0.8, transform=axes.transAxes, zorder=2)
        axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=style.INK, zorder=5)


@style.picture
def latency_against_breadth(report: Report) -> Figure:
    """Latency of one query at some fixed depths, computed from the unit costs, and what was measured at some points.

    Raises:
        NoData: there are neither.
    """
    unit = [
        (b, o, t)
        for row in rows(report, "unit_costs", "latency")
        if (b := count(look(row, "breadth"))) is not None
        and (o := number(look(row, "overhead_ms"))) is not None
        and (t := number(look(row, "ms_per_nfe"))) is not None
    ]
    depths = sorted({d for value in rows(report, "settings", "depths") if (d := count(value)) is not None})
    checked = _checked(report)
    if not (unit and depths) and not checked:
        raise style.NoData("the latency of single queries was not measured")
    figure = style.new_figure(report, 4.6, "Latency of one query against breadth", "one query at a time")
    axes = figure.subplots()
    shown = depths if len(depths) <= _LATENCY_DEPTHS else [depths[k] for k in _evenly(len(depths), _LATENCY_DEPTHS)]
    unit.sort()
    for colour, marker, depth in zip(style.SERIES, style.SERIES_MARKERS, reversed(shown), strict=False):
        ys = [o + t * depth * b for b, o, t in unit]
        axes.plot([b for b, _, _ in unit], ys, color=colour, marker=marker, markersize=4, label=f"fixed depth {depth}")
    _draw_checked(axes, checked)
    axes.set_yscale("log")
    style.powers_of_two(axes, [b for b, _, _ in unit] or [p.breadth or 1 for p, *_ in checked])
    style.plain_ticks(axes.yaxis, log=True)
    axes.set_xlabel("breadth (trajectories a puzzle)")
    axes.set_ylabel("milliseconds a query")
    figure.legend(loc="outside right center", title="lines: computed" if unit else None, alignment="left")
    return figure


def _evenly(n: int, kept: int) -> list[int]:
    return [round(k * (n - 1) / (kept - 1)) for k in range(kept)]


_BESIDE_P50 = (("latency_ms", "p95"), ("latency_ms_computed", "p50"))


def _checked(report: Report) -> list[tuple[Point, float, float | None, float | None]]:
    """Points that were run for real, with their measured median and 95th percentile in ms, by breadth."""
    everything, found = points(report), []
    for row in rows(report, "checked"):
        index = as_index(report, look(row, "index"), "checked")
        p50 = number(look(row, "latency_ms", "p50"))
        if index is not None and p50 is not None and everything[index].breadth is not None:
            p95, computed = (number(look(row, *path)) for path in _BESIDE_P50)
            found.append((everything[index], p50, p95, computed))
    return sorted(found, key=lambda row: (row[0].breadth or 0, row[1]))


def _draw_checked(axes: Axes, checked: list[tuple[Point, float, float | None, float | None]]) -> None:
    for breadth, group in groupby(checked, key=lambda row: row[0].breadth or 1):
        same = list(group)
        for k, (_, p50, p95, computed) in enumerate(same):
            x = breadth * 1.09 ** (k - (len(same) - 1) / 2)  # side by side
            if p95 is not None:
                axes.vlines(x, p50, max(p50, p95), color=style.INK, linewidth=1, zorder=4)
            axes.plot(x, p50, "o", color=style.INK, markersize=6, zorder=5)
            if computed is not None:
                axes.plot(x, computed, "_", color=style.INK, markersize=13, markeredgewidth=1.5, zorder=5)
    if checked:
        axes.plot([], [], "o", color=style.INK, label="measured p50;\nline up to p95")
        axes.plot([], [], "_", color=style.INK, markersize=13, markeredgewidth=1.5, label="computed p50\nof the same")


@style.picture
def memory_against_depth(report: Report) -> Figure:
    """Peak memory of a solve by depth, a line for each breadth.

    Raises:
        NoData: memory was not measured.
    """
    measured = sorted(
        (b, d, size)
        for row in rows(report, "unit_costs", "memory")
        if (d := count(look(row, "depth"))) is not None
        and (b := count(look(row, "breadth"))) is not None
        and (size := number(look(row, "peak_bytes"))) is not None
    )
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
    for (breadth, found), (colour, marker) in zip(reversed(by_breadth.items()), looks, strict=False):
        ys = [size / scale for _, _, size in found]
        axes.plot([d for _, d, _ in found], ys, color=colour, marker=marker, markersize=5, label=f"breadth {breadth}")
    style.powers_of_two(axes, [d for _, d, _ in measured])
    axes.set_ylim(0, max(1.15 * largest / scale, 1e-3))
    style.plain_ticks(axes.yaxis)
    axes.set_xlabel("depth (outer steps)")
    axes.set_ylabel(f"peak memory of a solve ({unit})")
    figure.legend(loc="outside right center")
    return figure
