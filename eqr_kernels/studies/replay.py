"""Halting and selection, replayed on a recording: what each way of running `solve` answers and spends."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from eqr_kernels import selection, trajectory
from eqr_kernels.run_rules import HALTING_RULES, RULES_WITH_TOLERANCE
from eqr_kernels.studies.recording import Recording, check_counts
from eqr_kernels.studies.types import Bools, Ints
from eqr_kernels.trajectory import Status

ANY = "any"
RULES = (*selection.RULES, ANY)
"""Those of `solve`, and "any": whether any trajectory is right, which an oracle would pick."""

POLICIES = {
    "fixed": "every trajectory runs to the depth",
    "residual": "a trajectory stops when its residual is at most tol",
    "q": "a trajectory stops when q_halt is above 0",
    "residual+q": "a trajectory stops when its residual is at most tol and q_halt above 0, at the same step",
    "race": "the first of a puzzle's trajectories whose residual is at most tol answers, and its siblings stop with it "
    "(views go one after the other)",
    "race+q": "the same, the first whose residual is at most tol and q_halt above 0",
}
_RULES_OF = {"fixed": "none", "race": "residual", "race+q": "residual+q"}


def first_converged(residuals: npt.ArrayLike, tol: float, patience: int = 1) -> tuple[Ints, Bools]:
    """When each trajectory halts under a tolerance: residuals float32 [N, D] -> steps int64 [N], converged bool [N].

    That is the first step that closes `patience` consecutive residuals <= tol; D, not converged, where there is none.
    """
    r = np.asarray(residuals, np.float32)
    if r.ndim != 2 or not r.shape[1]:
        raise ValueError(f"residuals must be [N, D >= 1], got shape {r.shape}")
    fires = _residual_fires(r, tol, patience)
    converged: Bools = np.asarray(fires.any(1))
    steps = np.where(converged, fires.argmax(1) + 1, r.shape[1]).astype(np.int64)
    return steps, converged


def _residual_fires(residuals: npt.NDArray[np.float32], tol: float, patience: int) -> Bools:
    """Whether each step closes `patience` consecutive residuals <= tol: [..., D] -> bool [..., D]."""
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    below: Bools = residuals <= np.float32(tol)
    fires: Bools = np.zeros_like(below)
    if patience <= below.shape[-1]:
        fires[..., patience - 1 :] = sliding_window_view(below, patience, axis=-1).all(-1)
    return fires


def _fired(status: npt.NDArray[np.integer]) -> Bools:
    fired: Bools = trajectory.settled(torch.from_numpy(status)).numpy()
    return fired


def settled(recording: Recording, tol: float) -> Bools:
    """Which trajectories have settled at each depth, their halting rule having fired: bool [N, B, K].

    In a recording without halting that is the rule "residual" at that very depth: a residual of at most the tolerance.
    """
    if recording.halt != "none":
        return _fired(recording.status)
    return ~recording.diverged & (recording.residual <= np.float32(tol))


Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Ends:
    """Where the first B trajectories of each puzzle stop.

    Attributes:
        place: int64 [N, B], among the recording's depths.
        steps: int64 [N, B], outer steps spent.
        status: int64 [N, B], of `Status`.
    """

    place: Ints
    steps: Ints
    status: Ints

    @property
    def settled(self) -> Bools:
        """bool [N, B], the halting rule fired."""
        return _fired(self.status)


def ends_at(recording: Recording, depth: int, breadth: int | None = None) -> Ends:
    """As the trajectories were recorded at a depth."""
    k, b = recording.place(depth), breadth or recording.breadth
    status = recording.status[:, :b, k].astype(np.int64)
    return Ends(np.full(status.shape, k), recording.steps[:, :b, k], status)


def ends_when_halted(
    recording: Recording,
    halt: str,
    *,
    tol: float | None = None,
    patience: int = 1,
    depth: int | None = None,
    breadth: int | None = None,
) -> Ends:
    """As a halting rule would have stopped the trajectories of a run without one.

    Where not every outer step is recorded, a trajectory goes on to the first recorded depth from the step on at which
    its rule fired (as far as it looks at q_halt: at which it holds): it spends a little more than `solve` would have,
    never less.

    Args:
        halt, patience, depth: as for `solve`; by default the recording's depth.
        tol: of the rules with a residual, which need it.

    Raises:
        ValueError: the recording was halted itself, or has no such depth or breadth; there is no such rule; tol is
            missing; its trajectories turned, and patience is above 1.
    """
    if halt not in HALTING_RULES:
        raise ValueError(f"halt must be one of {', '.join(HALTING_RULES)}, got {halt!r}")
    if halt in RULES_WITH_TOLERANCE and tol is None:
        raise ValueError(f'halt="{halt}" looks at the residual and needs tol, got None')
    if patience > 1 and recording.turn_every is not None:
        raise ValueError(f"patience must be 1 for a recording with turns, at which it counts anew, got {patience}")
    depth, breadth = depth or recording.depth, breadth or recording.breadth
    if recording.halt != "none":
        raise ValueError(f'only a recording without halting can be replayed, and this one has halt="{recording.halt}"')
    if depth > recording.depth or breadth > recording.breadth:
        raise ValueError(
            f"the policy needs depth {depth} and breadth {breadth}, and the recording has {recording.depth} and "
            f"{recording.breadth}"
        )
    last = recording.place(depth)
    depths = np.array(recording.depths[: last + 1])
    gone = recording.diverged_at[:, :breadth]
    positive: Bools = recording.q_halt[:, :breadth, : last + 1] > 0
    converged = halted = np.zeros_like(positive)  # [N, B, K], by which signal the rule has fired
    if halt in RULES_WITH_TOLERANCE and tol is not None:
        fires = _residual_fires(recording.residuals[:, :breadth, :depth], tol, patience)
        if halt == "residual+q":
            converged = fires[..., depths - 1] & positive
        else:
            converged = np.logical_or.accumulate(fires, axis=2)[..., depths - 1]
    if halt in ("q", "residual|q"):
        halted = positive
    fires = (converged | halted) & (depths < gone[..., None])
    fired, first = fires.any(2), fires.argmax(2)
    by_residual = np.take_along_axis(converged, first[..., None], 2)[..., 0]
    diverged = ~fired & (gone <= depth)
    place = np.where(fired, first, np.where(diverged, np.searchsorted(depths, gone), last))
    status = np.select(
        [diverged, fired & by_residual, fired],
        [int(Status.DIVERGED), int(Status.CONVERGED), int(Status.HALTED)],
        int(Status.MAX_DEPTH),
    )
    return Ends(place, np.where(diverged, gone, depths[np.minimum(place, last)]), status)


def at_ends(values: npt.NDArray[Scalar], ends: Ends) -> npt.NDArray[Scalar]:
    """[N, B, K] -> [N, B], each trajectory's value where it stops."""
    return np.take_along_axis(values[:, : ends.place.shape[1]], ends.place[..., None], 2)[..., 0]


def winners(recording: Recording, ends: Ends, rule: str) -> Ints:
    """The restart that a rule of `solve` selects for each puzzle: int64 [N]."""
    fields = (at_ends(x, ends) for x in (recording.answer.view(np.int64), recording.score, recording.q_halt))
    answer, score, q_halt = (torch.from_numpy(np.ascontiguousarray(x)) for x in fields)
    status, steps = torch.from_numpy(ends.status), torch.from_numpy(np.ascontiguousarray(ends.steps))
    chosen: Ints = selection.select(rule, answer[:, :, None], status, score, q_halt, steps).numpy()
    return chosen


def check_rules(rules: Sequence[str], halt: str) -> tuple[str, ...]:
    """Each once.

    Raises:
        ValueError: none, one that is not in `RULES`, or "first" without halting.
    """
    chosen = tuple(dict.fromkeys(rules))
    if not chosen or not set(chosen) <= set(RULES):
        raise ValueError(f"select must be of {', '.join(RULES)}, got {', '.join(map(repr, chosen)) or 'none'}")
    if "first" in chosen and halt == "none":
        raise ValueError('select="first" needs a halting rule, got halt="none"; use halt="residual" or halt="q"')
    return chosen


def correct_grid(
    recording: Recording, depths: Sequence[int], breadths: Sequence[int], rules: Sequence[str] = ("residual",)
) -> Bools:
    """Whether the answer at K depths, of the first trajectories of L breadths, by R rules is right: bool [N, K, L, R].

    Each cell is what `solve(depth=, breadth=, select=)` answers under the rule of halting of the recording. Without one
    no trajectory counts as settled, so "residual" takes the lowest score at the depth; with one a trajectory stays as
    it halted, and those that have halted by the depth go before those that have not.

    Args:
        depths: of those recorded. rules: of `RULES`.

    Raises:
        ValueError: a depth or breadth that was not recorded, or no such rule.
    """
    breadths, rules = check_counts("breadths", breadths), check_rules(rules, recording.halt)
    if breadths[-1] > recording.breadth:
        raise ValueError(f"breadths must be at most that of the recording, {recording.breadth}, got {breadths[-1]}")
    rows = np.arange(len(recording))

    def cell(ends: Ends, rule: str) -> Bools:
        correct = at_ends(recording.correct, ends)
        return np.asarray(correct.any(1)) if rule == ANY else correct[rows, winners(recording, ends, rule)]

    grid = [[[cell(ends_at(recording, d, b), rule) for rule in rules] for b in breadths] for d in depths]
    return np.moveaxis(np.array(grid), 3, 0)


def _rule_of(policy: str) -> str:
    """The halting rule of `solve`."""
    return _RULES_OF.get(policy, policy)


RACES = ("race", "race+q")
POLICIES_WITH_TOLERANCE = tuple(name for name in POLICIES if _rule_of(name) in RULES_WITH_TOLERANCE)


@dataclass(frozen=True, order=True)
class Policy:
    """One way of running `solve`.

    Attributes:
        name: of `POLICIES`.
        depth, breadth: outer steps at most, and trajectories of a puzzle.
        tol: of the policies that look at the residual, else None.
        select: the rule among the trajectories; "first" for races.
    """

    name: str
    depth: int
    breadth: int
    tol: float | None = None
    select: str = "residual"

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ValueError(f"a policy must be one of {', '.join(POLICIES)}, got {self.name!r}")
        if self.depth < 1 or self.breadth < 1:
            raise ValueError(f"depth and breadth must be at least 1, got {self.depth} and {self.breadth}")
        if (self.tol is not None) != (self.halt in RULES_WITH_TOLERANCE):
            needed = ", ".join(POLICIES_WITH_TOLERANCE)
            raise ValueError(f"tol is for the policies {needed}, which need it; got {self.name} with {self.tol}")
        if self.select not in selection.RULES:
            raise ValueError(f"select must be one of {', '.join(selection.RULES)}, got {self.select!r}")
        if (self.select == "first") != (self.name in RACES):
            raise ValueError(f'select="first" is for {" and ".join(RACES)} alone, got {self.name} with {self.select!r}')

    @property
    def halt(self) -> str:
        """The halting rule of `solve`."""
        return _rule_of(self.name)

    def arguments(self) -> dict[str, object]:
        """Those of `solve`."""
        tol = {} if self.tol is None else {"tol": self.tol}
        return {"depth": self.depth, "breadth": self.breadth, "halt": self.halt, **tol, "select": self.select}

    def call(self, *, views: bool = False, **options: object) -> str:
        """The arguments of `solve` beside the tokens, or of `solve_views` beside the views, as they are typed, without
        defaults that stay the same."""
        arguments = {**self.arguments(), **options}
        if views:
            del arguments["breadth"]
        if self.select == "residual":
            del arguments["select"]
        return ", ".join(f"{name}={json.dumps(value)}" for name, value in arguments.items())


def policies(
    depths: Sequence[int],
    breadths: Sequence[int],
    tols: Sequence[float],
    *,
    select: str = "residual",
) -> Iterator[Policy]:
    """All policies of these depths, breadths and tolerances; a race needs two trajectories."""
    for name, depth, breadth in itertools.product(POLICIES, depths, breadths):
        if name in RACES and breadth == 1:
            continue
        rule = "first" if name in RACES else select
        for tol in tols if name in POLICIES_WITH_TOLERANCE else [None]:
            yield Policy(name, depth, breadth, tol, rule)


@dataclass(frozen=True)
class Outcome:
    """What a policy did with each of N puzzles.

    Attributes:
        correct: bool [N], the selected answer is right.
        settled: bool [N], the selected trajectory's halting rule had fired; all False for "fixed".
        steps: int64 [N], outer steps of the selected trajectory.
        nfe: int64 [N], outer steps spent on all trajectories of the puzzle.
        longest: int64 [N], those of the trajectory that spent most: what a query takes where all go side by side.
        restart: int64 [N], the selected trajectory.
        one_by_one: int64 [N], how many trajectories were run, of a race of views, which go one after the other; None
            where all go at once.
    """

    correct: Bools
    settled: Bools
    steps: Ints
    nfe: Ints
    longest: Ints
    restart: Ints
    one_by_one: Ints | None = None


def outcome(recording: Recording, policy: Policy) -> Outcome:
    """What `solve` with the policy's arguments answers and spends, from a recording to at least its depth and breadth.

    That is, `solve_views` where the trajectories of the recording had views, and with `turns` where they turned. On a
    compiled backend it is the same to the last bit (the cuda backend's latency kernel, for up to 8 trajectories, rounds
    in its own way), but for what a race from random starts spends: here its trajectories go in step, so that all of
    them stop when the first has settled; one that runs fewer at a time spends another number. See `ends_when_halted`
    for recordings that lack some outer steps.

    Raises:
        ValueError: as `ends_when_halted`.
    """
    sizes = dict(depth=policy.depth, breadth=policy.breadth)
    ends = ends_when_halted(recording, policy.halt, tol=policy.tol, **sizes)
    race = policy.name in RACES
    if race:
        ends = _cancelled(recording, ends, policy.depth)
    restart, spent = winners(recording, ends, policy.select), ends.steps
    rows = np.arange(len(recording))
    correct = at_ends(recording.correct, ends)
    won = correct[rows, restart], ends.settled[rows, restart], spent[rows, restart]
    one_by_one = (spent > 0).sum(1) if race and recording.views else None
    return Outcome(*won, spent.sum(1), spent.max(1), restart, one_by_one)


def _cancelled(recording: Recording, ends: Ends, depth: int) -> Ends:
    """What is left of trajectories when the first of each puzzle has settled."""
    if recording.views:  # one after the other
        lost = np.cumsum(ends.settled, 1) - ends.settled > 0
        steps = np.where(lost, 0, ends.steps)
    else:
        first = np.where(ends.settled, ends.steps, depth).min(1, keepdims=True)
        lost, steps = ends.steps > first, np.minimum(ends.steps, first)
    return Ends(ends.place, steps, np.where(lost, int(Status.CANCELLED), ends.status))
