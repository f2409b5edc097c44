"""The one place that runs a model for a study: what its trajectories are at some depths, and every residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eqr_kernels import backends
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.results import SolveResult
from eqr_kernels.solver import precision_of
from eqr_kernels.studies.scoring import answer_codes, exact_match, token_accuracy
from eqr_kernels.studies.types import Bools, Codes, Floats, Ints, Progress
from eqr_kernels.tasks.views import MakeViews, Turns
from eqr_kernels.trajectory import Status
from eqr_kernels.turns import turn_count
from eqr_kernels.views import solve_puzzles

_CHUNK_BYTES = 128 << 20
_MOST_PUZZLES = 1024  # at a time: the logits of their winners are held
_PARTS = 16
_FULL = {"cpu": 64, "cuda": 4224}

Observer = Callable[[npt.NDArray[np.integer], SolveResult], object]
"""(labels [n, S] of a chunk of puzzles, what came of them)"""


@dataclass(frozen=True)
class Recording:
    """B trajectories of each of N puzzles at K depths of a run of D outer steps; those that had ended, as they ended.

    Attributes:
        depths: rising, the last one D.
        correct: bool [N, B, K], the answer is right in every labelled token; never without any label.
        accuracy: float32 [N, B, K], share of the labelled tokens that are right; NaN without any label.
        answer: uint64 [N, B, K], see `answer_codes`.
        score, q_halt: float32 [N, B, K]; score as `solve` has it after that step (the mean over a window).
        steps: int64 [N, B, K], outer steps spent. status: int8 [N, B, K], of `Status`.
        residuals: float32 [N, B, D], of every outer step; NaN after a trajectory's end. Without a trace [N, B, K], at
            the depths.
        halt: the rule under which they ran; only without ("none") can others be replayed.
        backend, backend_reason: what ran, and why.
        views: each trajectory of a puzzle had a view of its own, see `solve_views`.
        turn_every: outer steps between turns, see `turns` of `solve`; None: no turns.
    """

    depths: tuple[int, ...]
    correct: Bools
    accuracy: Floats
    answer: Codes
    score: Floats
    q_halt: Floats
    steps: Ints
    status: npt.NDArray[np.int8]
    residuals: Floats
    halt: str
    backend: str
    backend_reason: str
    views: bool = False
    turn_every: int | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.correct)

    @property
    def breadth(self) -> int:
        """B."""
        return self.correct.shape[1]

    @property
    def depth(self) -> int:
        """D."""
        return self.depths[-1]

    @property
    def every_step(self) -> bool:
        """Whether each outer step is among the depths."""
        return len(self.depths) == self.depth

    @property
    def traced(self) -> bool:
        """Whether `residuals` has every outer step."""
        return self.residuals.shape[2] == self.depth

    @cached_property
    def labelled(self) -> Bools:
        """bool [N], the puzzle has labels."""
        return ~np.isnan(self.accuracy[:, 0, 0])

    @cached_property
    def residual(self) -> Floats:
        """float32 [N, B, K], at the depths."""
        return np.take_along_axis(self.residuals, self.steps - 1, 2) if self.traced else self.residuals

    @cached_property
    def diverged(self) -> Bools:
        """bool [N, B, K], the state had turned non-finite."""
        return self.status == Status.DIVERGED

    @cached_property
    def diverged_at(self) -> Ints:
        """int64 [N, B], the step at which that happened; D + 1 where it never did."""
        return np.where(self.diverged[..., -1], self.steps[..., -1], self.depth + 1)

    def place(self, depth: int) -> int:
        """Where a depth stands among those recorded.

        Raises:
            ValueError: it was not recorded.
        """
        if depth not in self.depths:
            raise ValueError(f"depth {depth} was not recorded; those recorded are {_shown(self.depths)}")
        return self.depths.index(depth)

    def narrowed(self, breadth: int) -> Recording:
        """The first trajectories of each puzzle alone, in memory of their own."""
        narrow: dict[str, Any] = {name: values[:, :breadth].copy() for name, values in self.arrays().items()}
        return replace(self, **narrow)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def metadata(self) -> dict[str, Any]:
        """By name what is neither array nor depths, how the trajectories ran: JSON values."""
        return {name: getattr(self, name) for name in _METADATA}


_METADATA = ("halt", "backend", "backend_reason", "views", "turn_every")
ARRAYS = tuple(f.name for f in fields(Recording) if f.name not in ("depths", *_METADATA))
FORMAT = 2
"""Of recordings in files: one more whenever other fields are kept."""


def _shown(depths: Sequence[int]) -> str:
    some = [*map(str, depths[:8]), "...", str(depths[-1])] if len(depths) > 9 else map(str, depths)
    return ", ".join(some)


class Parts(Protocol):
    """Where finished parts of a recording are kept, by the first puzzle of each."""

    def load(self, start: int) -> Recording | None: ...

    def save(self, start: int, part: Recording) -> None: ...


def recordable_depths(
    model: EquilibriumReasoner,
    depth: int,
    include: Iterable[int] = (),
    *,
    backend: str = "auto",
    precision: str = "auto",
    turns: Turns | None = None,
) -> tuple[int, ...]:
    """Every outer step up to the depth, or, where the backend records fewer, as many as it takes.

    These have the depths of `include` and the last, and otherwise are evenly spaced on a logarithmic scale: a halting
    rule that is looked at there alone fires late by about the same share of the steps wherever it fires.

    Args:
        backend, precision, turns: as for `record`.

    Raises:
        ValueError: the backend cannot even record what must be included.
    """
    return spread_depths(depth, _depth_limit(model, turns, backend, precision), include)


def _depth_limit(
    model: EquilibriumReasoner, turns: Turns | None, backend: str = "auto", precision: str = "auto"
) -> int | None:
    chosen, _ = backends.choose(backend, model, precision_of(model, precision), turns=turns is not None)
    return chosen.max_checkpoints


def spread_depths(depth: int, limit: int | None, include: Iterable[int] = ()) -> tuple[int, ...]:
    """See `recordable_depths`; limit: how many depths at most, None for any number."""
    if limit is None or depth <= limit:
        return tuple(range(1, depth + 1))
    kept = sorted({1, *include, depth})
    _check_limit(kept, limit)
    while len(kept) < limit:
        gaps = [(b / a, a, b) for a, b in zip(kept, kept[1:], strict=False) if b > a + 1]
        _, a, b = max(gaps, key=lambda gap: (gap[0], -gap[1]))
        kept = sorted([*kept, min(b - 1, max(a + 1, round(math.sqrt(a * b))))])
    return tuple(kept)


def _check_limit(depths: Sequence[int], limit: int | None) -> None:
    if limit is not None and len(depths) > limit:
        raise ValueError(
            f"the backend records at most {limit} depths, and {len(depths)} are wanted: {_shown(depths)}; name fewer, "
            "or choose another backend"
        )


def record(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depths: Iterable[int],
    breadth: int = 1,
    chunk: int | None = None,
    parts: Parts | None = None,
    progress: Progress | None = None,
    observe: Observer | None = None,
    halt: str = "none",
    trace: bool = True,
    views: MakeViews | None = None,
    turns: Turns | None = None,
    **options: Any,
) -> Recording:
    """Runs all puzzles once, to the greatest of the depths.

    A deeper run passes through the shallower ones, and as random numbers are keyed by the restart, a broader run holds
    the narrower ones: what is recorded is what `solve` gives for each depth and breadth, bit for bit on a compiled
    backend (the cuda backend's latency kernel, for up to 8 trajectories, rounds in its own way).

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        depths: to be recorded.
        breadth: trajectories of each puzzle.
        views: gives each trajectory of a puzzle a view of its own; see `solve_views`. None: they differ in their random
            starts.
        turns: as for `solve`.
        chunk: puzzles in memory at a time, see `chunk_size`; on a compiled backend it changes no answer.
        parts: keeps each chunk as it is done, and gives back those that were done before, so that a run that was
            interrupted goes on where it stopped.
        progress: called with (outer steps spent or found in `parts`, outer steps in all).
        observe: called with the labels and the result of each chunk that is run, in order, before it is dropped.
        halt: as for `solve`, but without halting where nothing is said.
        trace: keep the residual of every outer step, which replays need; else those at the depths.
        options: further arguments of `solve` (tol, window, seed, noise_scale, slots, backend, precision).

    Raises:
        As `solve`; ValueError: the shapes do not fit, a count is below 1, or the backend records fewer depths.
    """
    questions, answers = np.asarray(inputs), np.asarray(labels)
    if questions.ndim != 2 or not len(questions) or questions.shape != answers.shape:
        raise ValueError(
            f"inputs and labels must both be [N >= 1, S], got shapes {questions.shape} and {answers.shape}"
        )
    depths = check_counts("depths", depths)
    for name, count in (("breadth", breadth), ("chunk", chunk)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    ran_by = {name: options[name] for name in ("backend", "precision") if name in options}
    _check_limit(depths, _depth_limit(model, turns, **ran_by))
    if chunk is None:
        size = questions.shape[1], depths, breadth, model.device.type
        held = held_bytes(model, views, turns, depths[-1], breadth)
        chunk = chunk_size(len(questions), *size, resumable=parts is not None, held=held)
    symmetries = dict(views=views, turns=turns)
    each = depths[-1] * breadth
    total = len(questions) * each
    done = []
    for start in range(0, len(questions), chunk):
        rows = slice(start, start + chunk)
        part = None if parts is None else parts.load(start)
        if part is None:

            def shown(_finished: int, _trajectories: int, spent: int, before: int = start * each) -> None:
                if progress is not None:
                    progress(before + spent, total)

            settings: dict[str, Any] = dict(depth=depths[-1], breadth=breadth, halt=halt, **symmetries, **options)
            result = solve_puzzles(model, questions[rows], checkpoints=depths, trace=trace, progress=shown, **settings)
            how = dict(views=views is not None, turn_every=None if turns is None else turns.every)
            part = _recorded(result, answers[rows], halt=halt, **how)
            if observe is not None:
                observe(answers[rows], result)
            if parts is not None:
                parts.save(start, part)
        done.append(part)
        if progress is not None:
            # Trajectories that halted have left steps unspent.
            progress(min(start + chunk, len(questions)) * each, total)
    return join(done)


def check_counts(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Rising and each once.

    Raises:
        ValueError: there are none, or one is below 1.
    """
    counts = tuple(sorted(set(values)))
    if not counts:
        raise ValueError(f"{name} must name at least one {name.removesuffix('s')}, got none")
    if counts[0] < 1:
        raise ValueError(f"{name} must be at least 1, got {counts[0]}")
    return counts


def held_bytes(
    model: EquilibriumReasoner, views: MakeViews | None, turns: Turns | None, depth: int, breadth: int
) -> int:
    """Bytes that are held of a token of every trajectory beside what is recorded: logits by `solve_views`, twice, and
    of what turns (a view, or a puzzle) some three tables of arrangements in int64."""
    logits = 0 if views is None else 2 * 4 * model.config.vocab_size
    arrangements = 0 if turns is None else 3 * 8 * turn_count(turns, depth)
    return logits + (arrangements if views is not None else -(-arrangements // breadth))


def chunk_size(
    puzzles: int,
    tokens: int,
    depths: Sequence[int],
    breadth: int,
    device: str = "cpu",
    *,
    resumable: bool = False,
    held: int = 0,
) -> int:
    """Puzzles at a time: what takes some 128 MB of records.

    If resumable, a sixteenth of all at most, so that little is lost when a run is interrupted, but enough trajectories
    to keep the device busy.

    Args:
        held: see `held_bytes`.
    """
    # Answers in int64 and six more numbers at each depth, and a residual at each step; twice, as an op's output is
    # copied.
    row = 2 * (len(depths) * (8 * tokens + 36) + 4 * depths[-1]) + tokens * held
    fits = _CHUNK_BYTES // (breadth * row)
    if resumable:
        busy = -(-_FULL.get(device, _FULL["cuda"]) // breadth)
        fits = min(fits, max(-(-puzzles // _PARTS), busy))
    return max(1, min(fits, _MOST_PUZZLES))


def join(parts: Sequence[Recording]) -> Recording:
    """Parts of a recording, one after the other."""
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return replace(parts[-1], **joined)


def _recorded(result: SolveResult, labels: npt.NDArray[np.integer], **how: Any) -> Recording:
    """Of n puzzles with labels [n, S]; how: halt, views, turn_every."""
    rows = []
    for depth in sorted(result.at):
        at = result.at[depth]
        preds = at.all_preds.cpu().numpy()  # [n, B, S]
        judged = exact_match(preds, labels), token_accuracy(preds, labels), answer_codes(preds)
        numbers = (x.cpu().numpy() for x in (at.all_score, at.all_q_halt, at.all_residual, at.all_steps, at.all_status))
        rows.append((*judged, *numbers))
    stacked = (np.stack(field, 2) for field in zip(*rows, strict=True))
    correct, accuracy, answer, score, q_halt, residual, steps, status = stacked
    return Recording(
        tuple(sorted(result.at)),
        correct,
        accuracy,
        answer,
        score,
        q_halt,
        steps,
        status.astype(np.int8),
        residual if result.residuals is None else result.residuals.cpu().numpy(),
        backend=result.backend,
        backend_reason=result.backend_reason,
        **how,
    )
