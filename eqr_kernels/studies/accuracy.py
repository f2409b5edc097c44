"""Runs of a model over many puzzles: a grid of depths and breadths, or every step of one trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eqr_kernels import selection
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.solver import Recorded, SolveResult
from eqr_kernels.studies.scoring import exact_match, token_accuracy
from eqr_kernels.studies.tolerance import first_converged
from eqr_kernels.studies.types import Bools, Floats, Ints, Progress
from eqr_kernels.trajectory import Status, settled

CHUNK = 1024
_CHUNK_BYTES = 256 << 20
ANY = "any"
RULES = (*selection.RULES, ANY)
"""Those of `solve`, and "any": whether any trajectory is right, which an oracle would pick."""

Observer = Callable[[npt.NDArray[np.integer], SolveResult], object]
"""(labels [n, S] of a chunk of puzzles, what came of them)"""


@dataclass(frozen=True)
class Evaluation:
    """Answers at K depths, L breadths and by R rules of one run to the full depth with the full breadth B.

    Attributes:
        depths, breadths: rising. rules: as asked for.
        grid: bool [N, K, L, R], the answer that the rule selects among the first trajectories, as many as the breadth,
            as they are at the depth, is right.
        labelled: bool [N], the puzzle has labels; one that has none is never right.
        all_exact: bool [N, K, B], a trajectory's answer is right. all_accuracy: float32 [N, K, B], the share of its
            labelled tokens that is, see `token_accuracy`.
        all_residual, all_score: float32 [N, K, B].
        all_steps: int64 [N, K, B], outer steps spent up to the depth.
        all_diverged: bool [N, K, B].
        all_settled: bool [N, K, B]: with a halting rule, it has fired; without, the residual at this very depth is at
            most the tolerance. None without halting and tolerance.
        steps: int64 [N, B], steps to the tolerance (the full depth where it was not met) or to the halt; None without
            halting and tolerance.
        converged: bool [N, B], the tolerance was met at some step, or the halting rule fired; None as `steps`.
        backend, backend_reason: what ran, and why.
    """

    depths: tuple[int, ...]
    breadths: tuple[int, ...]
    rules: tuple[str, ...]
    grid: Bools
    labelled: Bools
    all_exact: Bools
    all_accuracy: Floats
    all_residual: Floats
    all_score: Floats
    all_steps: Ints
    all_diverged: Bools
    all_settled: Bools | None
    steps: Ints | None
    converged: Bools | None
    backend: str
    backend_reason: str

    @property
    def exact(self) -> Bools:
        """bool [N, K]: at the greatest breadth, by the first rule."""
        return self.grid[:, :, -1, 0]


def evaluate(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depths: Sequence[int],
    breadth: int | Sequence[int] = 1,
    select: str | Sequence[str] = "residual",
    halt: str = "none",
    tol: float | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
    record: Sequence[int] = (),
    observe: Observer | None = None,
    **options: Any,
) -> Evaluation:
    """Exact accuracy at several depths and breadths, from one run to the greatest of both.

    A deeper run passes through the shallower ones, and as random numbers are keyed by the restart, a broader run
    holds the narrower ones: each cell is what `solve(depth=, breadth=, select=, halt=, tol=)` answers, bit for bit on a
    compiled backend (the cuda backend's latency kernel, for up to 8 trajectories, rounds in its own way).

    Without halting no trajectory counts as settled, so "residual" takes the lowest score at the depth, whatever `tol`.
    With halting a trajectory stays as it halted, and those that have halted by the depth go before those that have not.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        depths: outer steps.
        breadth: trajectories of each puzzle, one number or several.
        select: of `RULES`, one or several; "first" needs a halting rule.
        halt: as for `solve`: "none", "residual" or "q".
        tol: with halt="residual", of the halting rule; without halting, also find when each trajectory's residual
            meets it.
        chunk: puzzles in memory at a time, by default 1024 or what takes some 256 MB; it changes no answer.
        progress: called now and then, at every outer step by the reference backend.
        record: further depths, up to the greatest of `depths`, that `observe` finds in `SolveResult.at`.
        observe: called with each chunk's labels and result, in order, before the chunk is dropped.
        options: further arguments of `solve` (window, seed, noise_scale, slots, backend, precision).

    Raises:
        As `solve`, and ValueError: an empty or unknown `depths`, `breadth` or `select`.
    """
    depths = _counts("depths", depths)
    breadths = _counts("breadth", breadth if isinstance(breadth, Sequence) else [breadth])
    rules = _rules([select] if isinstance(select, str) else select, halt)
    if tol is not None and halt == "q":
        raise ValueError(f'tol is a residual, and halt="q" does not look at it, got tol={tol}; leave one out')
    if tol is not None and not 0 < tol < math.inf:
        raise ValueError(f"tol must be positive and finite, got {tol}")
    trace = tol is not None and halt == "none"
    recorded = tuple(sorted({*depths, *record}))
    settings: dict[str, Any] = dict(
        depth=depths[-1], breadth=breadths[-1], halt=halt, checkpoints=recorded, trace=trace, **options
    )
    if tol is not None and halt == "residual":
        settings["tol"] = tol
    if chunk is None:
        chunk = _chunk(np.shape(inputs)[-1], recorded, breadths[-1], trace)
    parts: list[dict[str, npt.NDArray[Any] | None]] = []
    for answers, result in _in_chunks(model, inputs, labels, chunk, progress, **settings):
        parts.append(_measure(answers, result, depths, breadths, rules, halt, tol))
        if observe is not None:
            observe(answers, result)
    joined: dict[str, Any] = {name: _join([part[name] for part in parts]) for name in parts[0]}
    ran: dict[str, Any] = dict(backend=result.backend, backend_reason=result.backend_reason)
    return Evaluation(depths, breadths, rules, **joined, **ran)


def _counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not len(values):
        raise ValueError(f"{name} must name at least one {name.removesuffix('s')}, got none")
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1, got {min(values)}")
    return tuple(sorted(set(values)))


def _rules(names: Sequence[str], halt: str) -> tuple[str, ...]:
    rules = tuple(dict.fromkeys(names))
    if not rules or not set(rules) <= set(RULES):
        raise ValueError(f"select must be of {', '.join(RULES)}, got {', '.join(map(repr, rules)) or 'none'}")
    if "first" in rules and halt == "none":
        raise ValueError('select="first" needs a halting rule, got halt="none"; use halt="residual" or halt="q"')
    return rules


def _chunk(tokens: int, depths: Sequence[int], breadth: int, trace: bool) -> int:
    """Puzzles at a time, so that what is recorded of their trajectories stays within bounds."""
    # Answers in int64 and six more numbers at each checkpoint and at the end; twice, as an op's output is copied.
    row = 2 * (len(depths) + 1) * (8 * tokens + 36) + 2 * 4 * depths[-1] * trace
    return max(1, min(CHUNK, _CHUNK_BYTES // (row * breadth)))


def _join(parts: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def _measure(
    answers: npt.NDArray[np.integer],
    result: SolveResult,
    depths: Sequence[int],
    breadths: Sequence[int],
    rules: Sequence[str],
    halt: str,
    tol: float | None,
) -> dict[str, npt.NDArray[Any] | None]:
    """What `Evaluation` keeps of a chunk of puzzles with labels [n, S]."""
    grid, told = [], []
    for depth in depths:
        at = Recorded(*(tensor.cpu() for tensor in vars(result.at[depth]).values()))
        preds = at.all_preds.numpy()
        wanted = np.broadcast_to(answers[:, None], preds.shape)
        exact = exact_match(preds.reshape(-1, preds.shape[2]), wanted.reshape(-1, preds.shape[2]))
        exact = exact.reshape(preds.shape[:2])  # [n, B]
        grid.append([[_selected(rule, at, exact, b) for rule in rules] for b in breadths])
        status, residual = at.all_status, at.all_residual.numpy()
        diverged = (status == Status.DIVERGED).numpy()
        still = settled(status).numpy()
        if halt == "none":
            still = ~diverged & (residual <= np.float32(np.nan if tol is None else tol))
        row = (exact, token_accuracy(preds, answers), residual, at.all_score.numpy(), at.all_steps.numpy(), diverged)
        told.append((*row, still))
    fields = [np.stack(field, 1) for field in zip(*told, strict=True)]
    names = ("exact", "accuracy", "residual", "score", "steps", "diverged", "settled")
    kept: dict[str, npt.NDArray[Any] | None] = {f"all_{name}": f for name, f in zip(names, fields, strict=True)}
    kept["grid"] = np.moveaxis(np.array(grid), 3, 0)
    kept["labelled"] = (answers != 0).any(1)
    kept["steps"] = kept["converged"] = None
    if halt != "none":
        kept["steps"], kept["converged"] = fields[4][:, -1], fields[6][:, -1]
    elif tol is None:
        kept["all_settled"] = None
    else:
        assert result.residuals is not None
        residuals = result.residuals.cpu().numpy()  # [n, B, D]
        steps, converged = first_converged(residuals.reshape(-1, residuals.shape[2]), tol)
        kept["steps"], kept["converged"] = (x.reshape(residuals.shape[:2]) for x in (steps, converged))
    return kept


def _selected(rule: str, at: Recorded, exact: Bools, breadth: int) -> Bools:
    """Whether the answer among the first `breadth` trajectories is right: exact bool [n, B] -> bool [n]."""
    right = exact[:, :breadth]
    if rule == ANY:
        found: Bools = np.asarray(right.any(1))
        return found

    def part(field: Tensor) -> Tensor:
        return field[:, :breadth]

    winner = selection.select(
        rule, part(at.all_preds), part(at.all_status), part(at.all_score), part(at.all_q_halt), part(at.all_steps)
    )
    return right[np.arange(len(right)), winner.numpy()]


@dataclass(frozen=True)
class Trajectories:
    """One trajectory of each puzzle, step by step.

    Attributes:
        residuals: float32 [N, D], NaN after a trajectory diverged.
        exact: bool [N, D], the answer after that many steps is right.
        backend: what ran.
    """

    residuals: Floats
    exact: Bools
    backend: str


def trajectories(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depth: int,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    **options: Any,
) -> Trajectories:
    """Residual and correctness at every step of one run without halting: what `calibrate` chooses a tolerance from.

    Args:
        inputs, labels: integers [N, S]; a label of 0 is not scored.
        chunk: puzzles in memory at a time; it changes no answer.
        options: further arguments of `solve` (seed, noise_scale, slots, backend, precision).
    """
    residuals, exact = [], []
    steps = range(1, depth + 1)
    settings: dict[str, Any] = dict(depth=depth, halt="none", checkpoints=tuple(steps), trace=True, **options)
    for answers, result in _in_chunks(model, inputs, labels, chunk, progress, **settings):
        assert result.residuals is not None
        residuals.append(result.residuals[:, 0].cpu().numpy())
        exact.append(np.stack([exact_match(result.at[k].preds.cpu().numpy(), answers) for k in steps], 1))
    return Trajectories(np.concatenate(residuals), np.concatenate(exact), result.backend)


def _in_chunks(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    chunk: int,
    progress: Progress | None,
    *,
    depth: int,
    breadth: int = 1,
    **options: Any,
) -> Iterator[tuple[npt.NDArray[np.integer], SolveResult]]:
    """Each chunk's labels, and its result."""
    questions, answers = np.asarray(inputs), np.asarray(labels)
    if questions.ndim != 2 or not len(questions) or questions.shape != answers.shape:
        raise ValueError(
            f"inputs and labels must both be [N >= 1, S], got shapes {questions.shape} and {answers.shape}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total = len(questions) * depth * breadth

    def report(spent: int) -> None:
        if progress is not None:
            progress(spent, total)

    for start in range(0, len(questions), chunk):
        tokens = torch.from_numpy(questions[start : start + chunk].astype(np.int64))
        before = start * depth * breadth

        def shown(_finished: int, _trajectories: int, spent: int, before: int = before) -> None:
            report(before + spent)

        result = model.solve(tokens, depth=depth, breadth=breadth, progress=shown, **options)
        # Trajectories that halted have left steps unspent.
        report(before + len(tokens) * depth * breadth)
        yield answers[start : start + chunk], result
