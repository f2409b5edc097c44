"""Every outer step of every trajectory, from one run to the greatest depth and breadth without halting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import SolveResult
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.studies.types import Bools, Floats, Ints
from eqr_kernels.trajectory import Status

_CHUNK_BYTES = 128 << 20
_PARTS = 16
_FULL = {"cpu": 64, "cuda": 4224}


@dataclass(frozen=True)
class Records:
    """What B trajectories of N puzzles were after each of D outer steps.

    Attributes:
        exact: bool [N, B, D], the answer is right in every labelled token.
        answer: int32 [N, B, D], the answer, numbered within a puzzle: equal numbers are equal answers.
        residual, score, q_halt: float32 [N, B, D]; score as `solve` has it after that step (the mean over a window).
        diverged: int64 [N, B], the step at which the state turned non-finite; D + 1 where it never did.
        backend, backend_reason: what ran, and why.
    """

    exact: Bools
    answer: npt.NDArray[np.int32]
    residual: Floats
    score: Floats
    q_halt: Floats
    diverged: Ints
    backend: str
    backend_reason: str

    @property
    def depth(self) -> int:
        """D."""
        return self.exact.shape[2]

    @property
    def breadth(self) -> int:
        """B."""
        return self.exact.shape[1]

    def __len__(self) -> int:
        """N."""
        return len(self.exact)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}


ARRAYS = tuple(f.name for f in fields(Records) if f.name not in ("backend", "backend_reason"))


class Parts(Protocol):
    """Where finished parts of a recording are kept, by the first puzzle of each."""

    def load(self, start: int) -> Records | None: ...

    def save(self, start: int, part: Records) -> None: ...


def record(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depth: int,
    breadth: int,
    chunk: int | None = None,
    parts: Parts | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Records:
    """Runs all puzzles once, without halting, and records every step.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        depth, breadth: D outer steps of B trajectories a puzzle.
        chunk: puzzles at a time, see `chunk_size`. On a compiled backend it changes no answer.
        parts: keeps each chunk as it is done, and gives back those that were done before, so that a run that was
            interrupted goes on where it stopped.
        progress: called with (outer steps spent or found in `parts`, outer steps in all).
        options: further arguments of `solve` (window, seed, noise_scale, slots, backend, precision).

    Raises:
        As `solve`; ValueError: the shapes do not fit, or `chunk` is below 1.
    """
    questions, answers = np.asarray(inputs), np.asarray(labels)
    if questions.ndim != 2 or not len(questions) or questions.shape != answers.shape:
        raise ValueError(
            f"inputs and labels must both be [N >= 1, S], got shapes {questions.shape} and {answers.shape}"
        )
    if chunk is None:
        chunk = chunk_size(len(questions), questions.shape[1], depth, breadth, model.device.type)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total = len(questions) * depth * breadth
    found = []
    for start in range(0, len(questions), chunk):
        rows = slice(start, start + chunk)
        part = None if parts is None else parts.load(start)
        if part is None:
            before = start * depth * breadth

            def shown(_finished: int, _trajectories: int, spent: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + spent, total)

            tokens = torch.from_numpy(questions[rows].astype(np.int64))
            result = model.solve(
                tokens,
                depth=depth,
                breadth=breadth,
                halt="none",
                checkpoints=tuple(range(1, depth + 1)),
                trace=True,
                progress=shown,
                **options,
            )
            part = _recorded(result, answers[rows])
            if parts is not None:
                parts.save(start, part)
        found.append(part)
        if progress is not None:
            progress(min(start + chunk, len(questions)) * depth * breadth, total)
    return join(found)


def chunk_size(puzzles: int, tokens: int, depth: int, breadth: int, device: str = "cpu") -> int:
    """Puzzles at a time: a sixteenth of all, so that little is lost when a run is interrupted, but enough trajectories
    to keep the device busy; and no more than some 128 MB of records."""
    # Answers in int64 and six more numbers at each step; twice, as an op's output is copied.
    most = _CHUNK_BYTES // (2 * breadth * depth * (8 * tokens + 36))
    busy = -(-_FULL.get(device, _FULL["cuda"]) // breadth)
    return max(1, min(most, max(-(-puzzles // _PARTS), busy)))


def join(parts: Iterable[Records]) -> Records:
    """Parts of a recording, one after the other."""
    known = list(parts)
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in known]) for name in ARRAYS}
    return Records(**joined, backend=known[-1].backend, backend_reason=known[-1].backend_reason)


def _recorded(result: SolveResult, answers: npt.NDArray[np.integer]) -> Records:
    """Of n puzzles with labels [n, S]."""
    steps = [result.at[depth] for depth in sorted(result.at)]
    preds = np.stack([at.all_preds.cpu().numpy() for at in steps], 2)  # [n, B, D, S]
    n, b, d, s = preds.shape
    wanted = np.broadcast_to(answers[:, None, None], preds.shape)
    exact = exact_match(preds.reshape(-1, s), wanted.reshape(-1, s)).reshape(n, b, d)
    answer = np.stack([_numbered(rows.reshape(b * d, s)).reshape(b, d) for rows in preds])
    assert result.residuals is not None
    diverged = np.stack([(at.all_status == Status.DIVERGED).cpu().numpy() for at in steps], 2)
    return Records(
        exact,
        answer,
        result.residuals.cpu().numpy(),
        np.stack([at.all_score.cpu().numpy() for at in steps], 2),
        np.stack([at.all_q_halt.cpu().numpy() for at in steps], 2),
        np.where(diverged.any(2), diverged.argmax(2) + 1, d + 1),
        result.backend,
        result.backend_reason,
    )


def _numbered(rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """A number for each of the rows [m, S], the same for the same row: int32 [m]."""
    # A row's bytes are compared at once, some ten times as fast as by columns.
    narrow = rows.astype(np.uint8 if rows.max() < 256 else np.int64)
    number: dict[bytes, int] = {}
    return np.array([number.setdefault(row.tobytes(), len(number)) for row in narrow], np.int32)
