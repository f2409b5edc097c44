"""The parts of a curve report by name, where any of them may be null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]

SCHEMA = 1
POLICIES = {"fixed": "fixed depth", "residual": "residual exit", "q": "q-halt", "race": "race"}
"""What each policy is called in pictures and tables."""
SECONDS = {"core_seconds": "core-seconds", "gpu_seconds": "GPU-seconds"}
"""The fields that may hold what a query costs, and their unit."""


def check_schema(report: Report) -> None:
    """Raises unless `report` is what `eqr curve` writes.

    Raises:
        TypeError: it is no dict.
        ValueError: it is of another command or schema.
    """
    if not isinstance(report, Mapping):
        raise TypeError(f"report must be a dict as in curve.json, got {type(report).__name__}")
    if report.get("schema") != SCHEMA or report.get("command", "curve") not in ("curve", None):
        raise ValueError(
            f"report must be from `eqr curve`, schema {SCHEMA}, got command {report.get('command')!r}, schema "
            f"{report.get('schema')!r}; write it again with `eqr curve`"
        )


def look(report: Any, *path: str) -> Any:
    """What stands at a path of names; None where any part of it is missing or null."""
    for name in path:
        if not isinstance(report, Mapping):
            return None
        report = report.get(name)
    return report


def rows(report: Any, *path: str) -> list[Any]:
    """The list at a path; empty where it is missing or null."""
    found = look(report, *path)
    return list(found) if isinstance(found, list | tuple) else []


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(report: Any, *path: str) -> list[float] | None:
    """The list of finite numbers at a path; None where it is missing or one of them is null."""
    found = [number(value) for value in rows(report, *path)]
    kept = [value for value in found if value is not None]
    return kept if found and len(kept) == len(found) else None


def count(value: Any) -> int | None:
    """A whole number, or None."""
    found = number(value)
    return None if found is None else int(found)


@dataclass(frozen=True)
class Point:
    """A policy with its depth, breadth and tolerance; None is what was not measured. Times in ms, cost in seconds."""

    policy: str
    depth: int | None
    breadth: int | None
    tol: float | None
    select: str | None
    correct: int | None
    total: int | None
    share: float | None
    low: float | None  # Wilson 95 %
    high: float | None
    nfe: float | None  # mean outer steps a puzzle, all its trajectories together
    layers: float | None  # the same in block applications
    p50: float | None
    p95: float | None
    p99: float | None
    throughput: float | None  # puzzles a second at saturation
    seconds: float | None  # core-seconds or GPU-seconds a query
    money: float | None  # for 1000 puzzles
    joules: float | None

    @property
    def label(self) -> str:
        """The policy's name."""
        return POLICIES.get(self.policy, self.policy)

    @property
    def short(self) -> str:
        """For example "residual exit, 64 × 8": depth × breadth."""
        sizes = " × ".join(str(size) for size in (self.depth, self.breadth) if size is not None)
        return ", ".join(filter(None, (self.label, sizes)))

    @property
    def name(self) -> str:
        """For example "residual exit, depth 64, breadth 8, tol 0.028"."""
        parts = {"depth": self.depth, "breadth": self.breadth, "tol": None if self.tol is None else f"{self.tol:.4g}"}
        return ", ".join([self.label, *(f"{part} {value}" for part, value in parts.items() if value is not None)])


def points(report: Report) -> list[Point]:
    """All points, in the order that `front` and `bend` index."""
    unit = seconds_field(report)
    return [_point(row, unit) for row in rows(report, "points")]


def _point(row: Any, unit: str | None) -> Point:
    interval = numbers(row, "accuracy", "wilson95") or []
    low, high = interval if len(interval) == 2 else (None, None)
    return Point(
        policy=str(look(row, "policy") or "unknown"),
        depth=count(look(row, "depth")),
        breadth=count(look(row, "breadth")),
        tol=number(look(row, "tol")),
        select=look(row, "select"),
        correct=count(look(row, "accuracy", "correct")),
        total=count(look(row, "accuracy", "total")),
        share=number(look(row, "accuracy", "share")),
        low=low,
        high=high,
        nfe=number(look(row, "nfe")),
        layers=number(look(row, "layer_equivalents")),
        p50=number(look(row, "latency_ms", "p50")),
        p95=number(look(row, "latency_ms", "p95")),
        p99=number(look(row, "latency_ms", "p99")),
        throughput=number(look(row, "throughput")),
        seconds=None if unit is None else number(look(row, unit)),
        money=number(look(row, "cost_per_1000")),
        joules=number(look(row, "joules")),
    )


def seconds_field(report: Report) -> str | None:
    """Which of `SECONDS` the points hold; None where none has one."""
    held = [field for field in SECONDS if any(number(look(row, field)) is not None for row in rows(report, "points"))]
    return held[0] if held else None


def seconds_unit(report: Report) -> str:
    """The unit of a query's cost; "seconds" where no point has one."""
    field = seconds_field(report)
    return "seconds" if field is None else SECONDS[field]


def index_at(report: Report, *path: str) -> int | None:
    """The index into `points` that stands at a path, or None; raises as `as_index` does."""
    return as_index(report, look(report, *path), ".".join(path))


def as_index(report: Report, value: Any, name: str) -> int | None:
    """`value` as an index into `points`; None where it is null.

    Raises:
        ValueError: there is no such point.
    """
    index, most = count(value), len(rows(report, "points"))
    if index is not None and not 0 <= index < most:
        raise ValueError(f"report's {name} must be an index into its {most} points, got {index}")
    return index


def front(report: Report) -> list[int]:
    """Indices of the Pareto front, as they stand."""
    found = [as_index(report, value, "front") for value in rows(report, "front")]
    return [index for index in found if index is not None]


def marks(report: Report) -> dict[int, list[str]]:
    """What each point that the report singles out is called, for example {12: ["best"], 7: ["knee", "recommended"]}."""
    within = number(look(report, "bend", "cheapest_within", "points"))
    near = "near the best" if within is None else f"within {within:g} points"
    named = {
        "knee": ("bend", "knee"),
        near: ("bend", "cheapest_within", "index"),
        "best": ("bend", "best"),
        "recommended": ("recommendation", "index"),
    }
    told: dict[int, list[str]] = {}
    for name, path in named.items():
        index = index_at(report, *path)
        if index is not None:
            told.setdefault(index, []).append(name)
    return told


def memory_of(report: Report, depth: int | None, breadth: int | None) -> float | None:
    """Peak bytes measured of a solve of exactly this depth and breadth, or None."""
    for row in rows(report, "unit_costs", "memory"):
        if (count(look(row, "depth")), count(look(row, "breadth"))) == (depth, breadth) and depth is not None:
            return number(look(row, "peak_bytes"))
    return None
