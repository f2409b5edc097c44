"""What `eqr curve` measures: the one form that the terminal, the pages and the comparison of results read."""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import dataclass, field
from operator import add
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from eqr_kernels.studies.checking import Checked
from eqr_kernels.studies.costs import Price, UnitCosts
from eqr_kernels.studies.points import Bend, Point, Saving

SCHEMA = 4
T = TypeVar("T")


class ReportError(ValueError):
    """A curve.json that is no report of this schema; the message names the field."""


@dataclass(frozen=True)
class Puzzles:
    """How many were run, of how many, from where (None: generated), in which groups; subset_seed: None without one."""

    count: int
    of: int
    file: str | None
    groups: dict[str, int]
    subset_seed: int | None
    reveal: int | None


@dataclass(frozen=True)
class TurnSettings:
    """As of `Turns`: outer steps between two turns, and symmetries of each puzzle."""

    every: int
    cycle: int


@dataclass(frozen=True)
class Settings:
    """What was asked for, with what the defaults came to.

    Attributes:
        depth, breadth: of the recording. depths, breadths, tols: of the points.
        views: the trajectories of a puzzle differ in their views of it, not in their random starts alone.
        turns: of each trajectory; None: none.
        recorded_depths: where halting is looked at; None: at every outer step.
        card_tol: what tol="auto" takes from the model's card.
        noise_scale, window, precision, instruction_set, config: what decides the answers.
    """

    depth: int
    breadth: int
    views: bool
    turns: TurnSettings | None
    depths: tuple[int, ...]
    breadths: tuple[int, ...]
    tols: tuple[float, ...]
    recorded_depths: tuple[int, ...] | None
    card_tol: float | None
    select: str
    seed: int
    slots: int | None
    noise_scale: float
    window: int
    precision: str
    instruction_set: str | None
    config: dict[str, Any]
    price: Price | None


@dataclass(frozen=True)
class CheckedPoint:
    """A point that was run for real: its index, why it was, and what came of it."""

    index: int
    why: tuple[str, ...]
    run: Checked


@dataclass(frozen=True)
class EarlyExit:
    """What stopping at the model's tolerance saves at the full depth, at each breadth."""

    tol: float
    rows: tuple[Saving, ...]


@dataclass(frozen=True)
class GroupSteps:
    """Of a group's puzzles, how many first trajectories settle at each outer step, on the right answer and on wrong
    ones."""

    name: str
    puzzles: int
    right: tuple[int, ...]
    wrong: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """Right and wrong together."""
        return tuple(map(add, self.right, self.wrong))

    @property
    def settled(self) -> int:
        """How many do at all."""
        return sum(self.steps)


@dataclass(frozen=True)
class Settling:
    """When the puzzles settle under the model's tolerance."""

    tol: float
    groups: tuple[GroupSteps, ...]


@dataclass(frozen=True)
class Residuals:
    """Residuals at the full depth, of the right trajectories and of the wrong ones.

    Attributes:
        right, diverged: trajectories of `trajectories`; those that diverged rank last and are in no bin.
        auroc: None where all or none are right.
        log10_edges: of the bins. right_counts, wrong_counts: in each.
    """

    trajectories: int
    right: int
    diverged: int
    auroc: float | None
    log10_edges: tuple[float, ...]
    right_counts: tuple[int, ...]
    wrong_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.log10_edges) - 1 == len(self.right_counts) == len(self.wrong_counts):
            raise ReportError(
                "residuals must have one log10_edges more than right_counts and wrong_counts, got "
                f"{len(self.log10_edges)}, {len(self.right_counts)} and {len(self.wrong_counts)}"
            )


@dataclass(frozen=True)
class Recommendation:
    """The point that was asked for; index and arguments (of `solve` or `solve_views`) are None where none will do."""

    target: float | None
    budget: str | None
    index: int | None
    arguments: str | None
    reason: str


@dataclass(frozen=True)
class CurveReport:
    """A map of depth, breadth and early exit. Indices are into `points`.

    Attributes:
        layers_per_step: block applications of an outer step.
        early_exit, settling: None where the model has no tolerance.
        recommendation: None where none was asked for.
        reproduce: the command, digests, machine and versions. errors: lines of the file that could not be used.
        seconds: that all of it took.
    """

    model: str
    task: str
    puzzles: Puzzles
    settings: Settings
    device: str
    backend: str
    backend_reason: str
    layers_per_step: int
    unit_costs: UnitCosts
    points: tuple[Point, ...]
    bend: Bend
    checked: tuple[CheckedPoint, ...]
    early_exit: EarlyExit | None
    settling: Settling | None
    residuals: Residuals
    recommendation: Recommendation | None
    reproduce: dict[str, Any]
    errors: tuple[dict[str, Any], ...] = field(default=())
    seconds: float = 0.0

    def __post_init__(self) -> None:
        indices: dict[str, tuple[int | None, ...]] = {
            "bend.front": tuple(self.bend.front),
            "bend.best": (self.bend.best,),
            "bend.cheapest_within": (self.bend.cheapest_within,),
            "bend.knee": (self.bend.knee,),
            "checked.index": tuple(row.index for row in self.checked),
            "recommendation.index": (self.recommendation.index if self.recommendation else None,),
        }
        for name, values in indices.items():
            for index in values:
                if index is not None and not 0 <= index < len(self.points):
                    raise ReportError(f"{name} must be an index into the {len(self.points)} points, got {index}")

    def to_json(self) -> str:
        """A JSON object, with a line for each field, and one for each item of its long lists."""
        body = {"command": "curve", "schema": SCHEMA, **_plain(self)}
        return "{\n" + ",\n".join(f" {json.dumps(name)}: {_lines(value)}" for name, value in body.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CurveReport:
        """The report that `to_json` wrote.

        Raises:
            ReportError: not JSON, of another command or schema, or a field is missing, unknown or of the wrong type.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise ReportError(f"a report must be JSON: {error}") from None
        body = dict(body) if isinstance(body, dict) else {}
        command, schema = body.pop("command", None), body.pop("schema", None)
        if command != "curve" or schema != SCHEMA:
            raise ReportError(
                f"a report must be from `eqr curve`, schema {SCHEMA}, got command {command!r}, schema {schema!r}; "
                "write it again with `eqr curve`"
            )
        return _read(cls, body, "")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return json.dumps(value, allow_nan=False)
    return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"


def _read(kind: type[T], value: Any, path: str) -> T:
    """`value`, of JSON, as a dataclass, with everything in it as the dataclass declares it."""
    if not isinstance(value, dict):
        raise ReportError(f"{path or 'a report'} must be an object, got {value!r}")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for message, wrong in (
        ("lacks", [name for name in names if name not in value]),
        ("has the unknown", [name for name in value if name not in names]),
    ):
        if wrong:
            raise ReportError(f"{path or 'the report'} {message} {', '.join(wrong)}; write it again with `eqr curve`")
    fields = {name: _typed(hints[name], value[name], f"{path}.{name}".lstrip(".")) for name in names}
    return kind(**fields)


def _typed(kind: Any, value: Any, path: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in inner if option is not type(None)]
        return None if value is None and len(options) < len(inner) else _typed(options[0], value, path)
    if dataclasses.is_dataclass(kind):
        return _read(kind, value, path)  # type: ignore[arg-type]
    if origin in (tuple, list) and isinstance(value, list):
        several = inner[-1] is ... or origin is list
        if several or len(inner) == len(value):
            kinds = [inner[0]] * len(value) if several else inner
            return origin(_typed(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(inner[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind is Any or (isinstance(kind, type) and type(value) is kind):
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ReportError(f"{path} must be {kind.__name__ if type(kind) is type else kind}, got {value!r}")
