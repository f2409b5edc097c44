"""What a request may say and what is answered, as pydantic models: checked by them, and OpenAPI by them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from eqr_kernels import noise
from eqr_kernels.arguments import check_choice, check_count, check_number
from eqr_kernels.run_rules import HALTING_RULES, SELECTION_RULES
from eqr_kernels.serving.http.errors import Refused, shortened
from eqr_kernels.tolerance import check_tolerance

_ID_LIMIT = 1 << 63


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body: bytes. puzzles: in a request. depth, breadth: of each. steps: depth x breadth, the outer steps that a
            puzzle may cost. seconds: until its deadline, and the deadline of a request that names none.
    """

    body: int = 1 << 20
    puzzles: int = 256
    depth: int = 1024
    breadth: int = 128
    steps: int = 16_384
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("body", "puzzles", "depth", "breadth", "steps"):
            check_count(f"the limit of {name}", getattr(self, name))
        if check_number("the limit of seconds", self.seconds) == 0:
            raise ValueError("the limit of seconds must be above 0, got 0")


@dataclass(frozen=True)
class Defaults:
    """What a request that leaves a field out gets."""

    depth: int = 64
    breadth: int = 1
    tol: float | str = "auto"
    select: str = "residual"
    halt: str = "residual"
    turn_every: int | None = None

    def fit(self, limits: Limits) -> None:
        """Raises ValueError where a request that says nothing would already ask for too much."""
        for name in ("depth", "breadth"):
            value, most = check_count(name, getattr(self, name)), getattr(limits, name)
            if value > most:
                raise ValueError(f"{name} is {value} by default, and a request may ask for {most} at most; raise that")
        if self.depth * self.breadth > limits.steps:
            raise ValueError(
                f"depth x breadth is {self.depth} x {self.breadth} by default, and a request may ask for "
                f"{limits.steps} at most; raise that"
            )
        check_tolerance(self.tol)
        check_choice("select", self.select, SELECTION_RULES)
        check_choice("halt", self.halt, tuple(HALTING_RULES))
        if self.halt == "none" and self.select == "first":
            raise ValueError('select is "first" by default, which needs a halting rule, and halt "none"; change one')
        if self.turn_every is not None and check_count("turn_every", self.turn_every) >= self.depth:
            raise ValueError(
                f"turn_every is {self.turn_every} by default and depth {self.depth}, so that nothing turns; lower it"
            )


def _in_our_words(check: Callable[[Any], Any]) -> BeforeValidator:
    """The library's own check, with its message; pydantic's bounds behind it are the server's, and for the schema."""

    def checked(value: Any) -> Any:
        try:
            return check(value)
        except TypeError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(checked)


def _choice(name: str, allowed: tuple[str, ...]) -> Any:
    def check(value: object) -> object:
        check_choice(name, value, allowed)
        return value

    return Annotated[Literal[allowed], _in_our_words(check)]


def _deadline(value: object) -> float:
    if (seconds := check_number("deadline", value)) == 0:
        raise ValueError("deadline must be above 0 seconds, got 0")
    return seconds


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


class SolveRequest(BaseModel):
    """The fields of a request, see `request_model` for their bounds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    puzzles: list[str]
    depth: int
    breadth: int
    tol: float | str
    select: str
    halt: str
    patience: int
    turn_every: int | None
    noise_scale: float | None
    seed: int
    ids: list[int] | None
    deadline: float
    stream: bool

    def options(self) -> dict[str, Any]:
        """Of `Engine.submit`, all but ids and turns."""
        names = ("depth", "breadth", "tol", "select", "halt", "patience", "noise_scale", "seed", "deadline")
        return {name: getattr(self, name) for name in names}


def request_model(limits: Limits, defaults: Defaults, example: str) -> type[SolveRequest]:
    """`SolveRequest` with the bounds of this server.

    Args:
        example: the text of a puzzle.
    """
    count = {name: _in_our_words(partial(check_count, name)) for name in ("depth", "breadth", "patience")}
    fields: dict[str, Any] = {
        "puzzles": (
            list[str],
            Field(
                min_length=1,
                max_length=limits.puzzles,
                description="Each as text, as the model's task writes it. One that cannot be read is an error of its "
                "own place in the results, and the others are solved.",
            ),
        ),
        "depth": (
            Annotated[int, Field(ge=1, le=limits.depth), count["depth"]],
            Field(defaults.depth, description="Outer steps of a trajectory, at most."),
        ),
        "breadth": (
            Annotated[int, Field(ge=1, le=limits.breadth), count["breadth"]],
            Field(
                defaults.breadth,
                description="Trajectories of each puzzle, from different random starts. depth x breadth may be "
                f"{limits.steps} at most.",
            ),
        ),
        "tol": (
            Annotated[
                Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto", "fast"],
                _in_our_words(check_tolerance),
            ],
            Field(defaults.tol, description="Residual that counts as settled: a number, or the card's auto or fast."),
        ),
        "select": (
            _choice("select", tuple(SELECTION_RULES)),
            Field(defaults.select, description="Which trajectory answers."),
        ),
        "halt": (
            _choice("halt", tuple(HALTING_RULES)),
            Field(defaults.halt, description="When a trajectory stops."),
        ),
        "turn_every": (
            Annotated[
                Annotated[int, Field(ge=1, le=limits.depth)] | None,
                _in_our_words(_optional(partial(check_count, "turn_every"))),
            ],
            Field(
                defaults.turn_every,
                description="After so many outer steps the puzzle's cells move by a symmetry that its task knows, and "
                "the latent states with them; null: never.",
            ),
        ),
        "patience": (
            Annotated[int, Field(ge=1, le=limits.depth), count["patience"]],
            Field(1, description="Steps in a row at or below tol."),
        ),
        "noise_scale": (
            Annotated[
                Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
                _in_our_words(_optional(partial(check_number, "noise_scale"))),
            ],
            Field(None, description="Of the noise injection; null takes the model's."),
        ),
        "seed": (
            Annotated[int, Field(ge=0, le=(1 << 32) - 1), _in_our_words(lambda v: noise.check_word("seed", v, 32))],
            Field(0, description="Of random starts and noise: the same seed gives the same answer, bit for bit."),
        ),
        "ids": (
            Annotated[list[Annotated[int, Field(ge=-_ID_LIMIT, lt=_ID_LIMIT)]], Field(max_length=limits.puzzles)]
            | None,
            Field(None, description="Of each puzzle, key its random stream; null takes a hash of its tokens."),
        ),
        "deadline": (
            Annotated[float, Field(gt=0, le=limits.seconds), _in_our_words(_deadline)],
            Field(limits.seconds, description="Seconds from now, in the queue and in flight together."),
        ),
        "stream": (
            bool,
            Field(False, description="Answer with JSON lines: one for each outer step, then the results."),
        ),
    }
    model: type[SolveRequest] = create_model("SolveRequest", __base__=SolveRequest, **fields)
    model.model_config["json_schema_extra"] = {"examples": [{"puzzles": [example], "depth": defaults.depth, "seed": 7}]}
    model.__doc__ = "Puzzles to solve, and how."
    model.model_rebuild(force=True)
    return model


def parse_request(body: bytes, model: type[SolveRequest], limits: Limits) -> SolveRequest:
    """The request in a body.

    Raises:
        Refused: 400, in the library's words where it has some.
    """
    try:
        value = json.loads(body)
    except RecursionError:
        raise Refused(400, 'the body is nested too deeply; send an object such as {"puzzles": [...]}') from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise Refused(400, f'the body must be an object such as {{"puzzles": [...]}}, got {shortened(value)} ({kind})')
    try:
        request = model.model_validate(value)
    except ValidationError as error:
        raise _explained(error, model) from None
    if request.depth * request.breadth > limits.steps:
        raise Refused(
            400,
            f"depth x breadth must be at most {limits.steps} on this server, got {request.depth} x {request.breadth}; "
            "lower one of them",
            "depth",
        )
    every = request.turn_every
    if every is not None and every >= request.depth:
        if "turn_every" in request.model_fields_set:
            bound = f"less than the depth, {request.depth}, or nothing turns"
            raise Refused(400, f"turn_every must be {bound}, got {every}; leave it out", "turn_every")
        request.turn_every = None  # the default of deeper requests
    if request.ids is not None and len(request.ids) != len(request.puzzles):
        wanted = f"one for each of the {len(request.puzzles)} puzzles"
        raise Refused(400, f"ids must be {wanted}, got {len(request.ids)}", "ids")
    return request


def _explained(error: ValidationError, model: type[SolveRequest]) -> Refused:
    first = error.errors(include_url=False)[0]
    place = [part for part in first["loc"] if isinstance(part, int) or part in model.model_fields]
    name = str(first["loc"][0]) if first["loc"] else "the body"
    where = name + "".join(f"[{part}]" for part in place[1:] if isinstance(part, int))
    kind, came, context = first["type"], first.get("input"), first.get("ctx", {})
    known = ", ".join(model.model_fields)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, list(model.model_fields), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        message = f"{shortened(name)} is no field of a request; {hint}There are {known}"
    elif kind == "missing":
        message = f'{name} is missing; a request needs it, as in {{"puzzles": [...]}}'
    elif kind == "value_error":
        message = str(context["error"])
    elif kind in ("less_than_equal", "less_than"):
        most = context.get("le", context.get("lt"))
        bound = f"at most {most}" if kind == "less_than_equal" else f"below {most}"
        message = f"{where} must be {bound} on this server, got {shortened(came)}"
    elif kind == "too_long":
        message = f"{name} must be at most {context['max_length']} on this server, got {context['actual_length']}"
    elif kind == "too_short":
        message = f"{name} must hold at least {context['min_length']}, got {context['actual_length']}"
    else:
        allowed = first["msg"].removeprefix("Input should be ")
        message = f"{where} must be {allowed}, got {shortened(came)}"
    return Refused(400, message[:500], where[:80])


# answers -------------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What is wrong, what is allowed, and the remedy."""

    model_config = ConfigDict(extra="forbid")
    message: str
    argument: Annotated[str, Field(description="The field of the request that it is about.")] | None = None


class Failure(BaseModel):
    """In place of an answer."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"error": {"message": "depth must be at least 1, got 0", "argument": "depth"}}]
        },
    )
    error: ErrorDetail


class Answer(BaseModel):
    """Of one puzzle: the selected trajectory's, and what it cost."""

    model_config = ConfigDict(extra="forbid")
    prediction: Annotated[str, Field(description="As the model's task writes it.")]
    valid: Annotated[bool, Field(description="It solves the puzzle by the rules of the task.")]
    status: Literal["converged", "halted", "max_depth", "cancelled", "diverged"]
    converged: Annotated[bool, Field(description="Its halting rule had fired.")]
    steps: Annotated[int, Field(ge=0, description="Outer steps of the selected trajectory.")]
    residual: Annotated[float | None, Field(description="null: not finite.")]
    q_halt: float | None
    score: float | None
    restart: Annotated[int, Field(ge=0, description="The selected trajectory.")]
    nfe: Annotated[int, Field(ge=0, description="Outer steps of all its trajectories.")]


class Results(BaseModel):
    """An entry for each puzzle, in their order."""

    model_config = ConfigDict(extra="forbid")
    results: list[Answer | Failure]
    seconds: Annotated[float, Field(ge=0, description="From the request to its results, in the server.")]
    steps_left_out: Annotated[int, Field(ge=0, description="Of a stream: lines that a slow reader missed.")] = 0


class Step(BaseModel):
    """One outer step of one trajectory: a line of a stream."""

    model_config = ConfigDict(extra="forbid")
    puzzle: Annotated[int, Field(ge=0, description="Place in `puzzles`.")]
    restart: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=1)]
    prediction: str
    residual: float | None
    q_halt: float | None
    settled: bool


class Health(BaseModel):
    status: Literal["ok"]
