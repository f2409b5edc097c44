"""How the pictures look, and the one place that imports matplotlib."""

from __future__ import annotations

import functools
import importlib.util
import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eqr_kernels.cli.render.wording import symmetries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from eqr_kernels.studies.curve_report import CurveReport

WIDTH = 8.0  # inches: 800 px at 100 px an inch, so that text of 10 points is read at that width
DPI = 150
INSTALL = 'pip install "eqr_kernels[plot]"'

# The palette of Okabe and Ito, which stays apart in every kind of colour blindness (jfly.uni-koeln.de/color).
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, FAINT = "#222222", "#666666"
POLICY_LOOKS = {
    "fixed": (BLUE, "o"),
    "residual": (ORANGE, "^"),
    "q": (GREEN, "s"),
    "residual+q": (VERMILLION, "v"),
    "race": (PURPLE, "D"),
    "race+q": (SKY, "P"),
}
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
SERIES_MARKERS = "osD^vP"

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    # Names of models and groups may hold dollar signs, which would start mathematics.
    "text.parse_math": False,
    # Ids in an SVG are random without a salt; letters as outlines look the same everywhere.
    "svg.hashsalt": "eqr_kernels",
    "svg.fonttype": "path",
}


def require() -> None:
    """Raises where a report could not be written, before the work for it begins.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"a report needs {' and '.join(missing)}: {INSTALL}")


class NoData(ValueError):
    """A picture that the report has no numbers for; the message says which are missing, and why if that is known."""


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's own defaults and this style, whatever the user's matplotlibrc says.

    Raises:
        ImportError: matplotlib is not installed; names the remedy.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"the pictures of a report need matplotlib: {INSTALL} ({error})") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def picture(draw: Callable[[CurveReport], Figure]) -> Callable[[CurveReport], Figure]:
    """Makes a picture of a function that draws: it runs in the style."""

    @functools.wraps(draw)
    def drawn(report: CurveReport) -> Figure:
        with styled():
            return draw(report)

    return drawn


def new_figure(report: CurveReport, height: float, title: str, *parts: str) -> Figure:
    """An empty figure of the usual width, not known to pyplot.

    Args:
        report: for the model, its symmetries and the device, which stand under the title.
        height: inches.
        title: in bold.
        parts: what else is to be said under it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    under = textwrap.wrap(
        textwrap.shorten(", ".join([report.model + symmetries(report), report.device, *parts]), 190, placeholder=" …"),
        100,
    )
    # The layout keeps room for the title alone, so the title has empty lines where the smaller text goes.
    figure.suptitle(title + "\n " * len(under), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.29 / height, "\n".join(under), va="top", fontsize=9, color=FAINT).set_in_layout(False)
    return figure


def tick_text(value: float) -> str:
    """2,000 and 0.00001 rather than 2e+03 and 1e-05."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.8f}".rstrip("0").rstrip(".") if abs(value) >= 1e-6 else f"{value:g}"


def plain_ticks(axis: Axis, log: bool = False) -> None:
    """Tick labels such as 0.01 and 2,000 instead of powers; on a logarithmic axis three a decade where there is room.

    Call it after the limits are set.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    if log:
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,), numticks=20))
        axis.set_minor_formatter(NullFormatter())


def powers_of_two(axes: Axes, values: list[int]) -> None:
    """A logarithmic x axis whose ticks are `values`, thinned to those that fit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    kept = sorted(set(values))
    while len(kept) > 12:
        kept = kept[::-2][::-1]
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def spread(wanted: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The rising places nearest to the wanted ones that are `gap` apart and half of it from the ends.

    Least squares by pooling neighbours that are too close (isotonic regression of the places less their ranks' gaps).

    Args:
        wanted: rising, at most as many as fit.
        gap: least distance.
        low, high: the ends.
    """
    pools: list[tuple[float, int]] = []  # mean and size
    for rank, place in enumerate(wanted):
        mean, size = place - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean, size = (mean * size + before * others) / (size + others), size + others
        pools.append((mean, size))
    first, last = low + gap / 2, high - gap / 2 - (len(wanted) - 1) * gap
    flat = [min(max(mean, first), last) for mean, size in pools for _ in range(size)]
    return [place + rank * gap for rank, place in enumerate(flat)]


def save(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg", the same bytes for the same figure."""
    metadata: dict[str, Any] = {"png": {"Software": None}, "svg": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
    with styled():
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata[kind])
    return file.getvalue()
