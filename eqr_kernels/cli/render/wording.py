"""Numbers and points as people read them. None, what was not measured, becomes the empty string."""

from __future__ import annotations

import math
from typing import Any

from eqr_kernels.cli.render.reading import Point


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


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def signed_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """For example "78.8 to 88.9 %"."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def whole(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def mebibytes(size: float | None) -> str:
    return "" if size is None else significant(size / 2**20)


def tolerance(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def money(value: float | None, currency: Any) -> str:
    """For example "0.0123 USD"."""
    return "" if value is None else f"{significant(value)} {currency or ''}".strip()


def arguments(point: Point) -> str:
    """What to give to `solve` beside the tokens so that it runs this point; "" for a policy that is not known."""
    halts = {"fixed": "none", "residual": "residual", "race": "residual", "q": "q"}
    if point.policy not in halts or point.depth is None or point.breadth is None:
        return ""
    words = [f"depth={point.depth}", f"breadth={point.breadth}", f'halt="{halts[point.policy]}"']
    if halts[point.policy] == "residual" and point.tol is not None:
        words.append(f"tol={point.tol:.6g}")
    rule = "first" if point.policy == "race" else point.select
    if rule not in (None, "residual"):
        words.append(f'select="{rule}"')
    return ", ".join(words)
