"""Ways of stopping and selecting, replayed on recorded trajectories: what each answers and spends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eqr_kernels import selection
from eqr_kernels.studies.recording import Records
from eqr_kernels.studies.types import Bools, Ints
from eqr_kernels.trajectory import Status

POLICIES = {
    "fixed": "every trajectory runs to the depth",
    "residual": "a trajectory stops when its residual is at most tol",
    "q": "a trajectory stops when q_halt is above 0",
    "race": "the first of a puzzle's trajectories whose residual is at most tol answers, and its siblings stop with it",
}


@dataclass(frozen=True, order=True)
class Policy:
    """One way of running `solve`.

    Attributes:
        name: of `POLICIES`.
        depth, breadth: outer steps at most, and trajectories of a puzzle.
        tol: of "residual" and "race", else None.
        select: the rule among the trajectories; "first" for "race".
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
        if (self.tol is not None) != (self.name in ("residual", "race")):
            raise ValueError(
                f"tol is for the policies residual and race, and they need it; got {self.name} with {self.tol}"
            )
        if self.select not in selection.RULES:
            raise ValueError(f"select must be one of {', '.join(selection.RULES)}, got {self.select!r}")
        if (self.select == "first") != (self.name == "race"):
            raise ValueError(f'select="first" is for the policy race alone, got {self.name} with {self.select!r}')

    def arguments(self) -> dict[str, object]:
        """Those of `solve`."""
        halt = {"fixed": "none", "race": "residual"}.get(self.name, self.name)
        told: dict[str, object] = {"depth": self.depth, "breadth": self.breadth, "halt": halt, "select": self.select}
        return told if self.tol is None else {**told, "tol": self.tol}


def grid(
    depths: Sequence[int],
    breadths: Sequence[int],
    tols: Sequence[float],
    *,
    select: str = "residual",
    names: Sequence[str] = tuple(POLICIES),
) -> Iterator[Policy]:
    """All policies of these depths, breadths and tolerances; a race needs two trajectories."""
    for name, depth, breadth in itertools.product(names, depths, breadths):
        if name == "race" and breadth == 1:
            continue
        rule = "first" if name == "race" else select
        for tol in tols if name in ("residual", "race") else [None]:
            yield Policy(name, depth, breadth, tol, rule)


@dataclass(frozen=True)
class Outcome:
    """What a policy did with each of N puzzles.

    Attributes:
        exact: bool [N], the selected answer is right.
        settled: bool [N], the selected trajectory's halting rule had fired; all False for "fixed".
        steps: int64 [N], outer steps of the selected trajectory.
        nfe: int64 [N], outer steps spent on all trajectories of the puzzle.
        longest: int64 [N], those of the trajectory that spent most: what a query takes where all go side by side.
        restart: int64 [N], the selected trajectory.
    """

    exact: Bools
    settled: Bools
    steps: Ints
    nfe: Ints
    longest: Ints
    restart: Ints


def outcome(records: Records, policy: Policy) -> Outcome:
    """What `solve` with the policy's arguments answers and spends, from a recording to at least its depth and breadth.

    On a compiled backend it is the same to the last bit (the cuda backend's latency kernel, for up to 8 trajectories,
    rounds in its own way), but for what a race spends: here its trajectories go in step, so that all of them stop when
    the first has settled; one that runs fewer at a time spends another number.

    Raises:
        ValueError: the recording is not as deep or as broad.
    """
    if policy.depth > records.depth or policy.breadth > records.breadth:
        raise ValueError(
            f"the policy needs depth {policy.depth} and breadth {policy.breadth}, and the recording has "
            f"{records.depth} and {records.breadth}"
        )
    n, d = len(records), policy.depth

    def part(name: str) -> npt.NDArray[Any]:
        return np.asarray(getattr(records, name))[:, : policy.breadth, :d]

    fires: Bools = np.zeros((n, policy.breadth, d), bool)
    if policy.name == "q":
        fires = np.asarray(part("q_halt") > 0)
    elif policy.tol is not None:
        fires = np.asarray(part("residual") <= np.float32(policy.tol))
    gone = records.diverged[:, : policy.breadth]
    fires &= np.arange(1, d + 1) < gone[:, :, None]
    settled: Bools = np.asarray(fires.any(2))
    stop = np.where(settled, fires.argmax(2) + 1, d)
    diverged = ~settled & (gone <= d)
    steps = np.where(diverged, gone, stop)

    def at_stop(name: str) -> npt.NDArray[Any]:
        return np.asarray(np.take_along_axis(part(name), steps[:, :, None] - 1, 2)[:, :, 0])

    halted = Status.HALTED if policy.name == "q" else Status.CONVERGED
    status = np.select([diverged, settled], [int(Status.DIVERGED), int(halted)], int(Status.MAX_DEPTH))
    exact: Bools = at_stop("exact")
    restart = selection.select(
        policy.select,
        torch.from_numpy(at_stop("answer").astype(np.int64))[:, :, None],
        torch.from_numpy(status),
        torch.from_numpy(at_stop("score")),
        torch.from_numpy(at_stop("q_halt")),
        torch.from_numpy(steps),
    ).numpy()
    spent = steps
    if policy.name == "race":
        first = np.where(settled, steps, d).min(1, keepdims=True)
        spent = np.minimum(steps, first)
    rows = np.arange(n)
    won = exact[rows, restart], settled[rows, restart], steps[rows, restart]
    return Outcome(*won, spent.sum(1), spent.max(1), restart)
