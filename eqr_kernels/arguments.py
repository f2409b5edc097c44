"""Checks of arguments: each returns the value, or raises with the name, what came and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence


def check_count(name: str, value: object) -> int:
    """An int of at least 1.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """One of `allowed`.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_number(name: str, value: object) -> float:
    """A finite number, not negative.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)


def check_function(name: str, value: object) -> None:
    """A function or None.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r} ({type(value).__name__})")
